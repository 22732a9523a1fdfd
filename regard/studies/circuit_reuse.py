"""Circuit Component Reuse Across Tasks in Transformer Language Models (Merullo et al., 2023, 2310.08744).

    e = (ld(patched) - ld(clean)) / (ld(corrupt) - ld(clean))         ld = logit[correct] - logit[wrong]
    circuit = the 2 % of all heads with the largest |e| onto the logits, and onto the queries of those
    overlap = |A & B| / |A | B|

Path patching, in closed form and so with MLPs held, finds the heads that write the indirect object's name
and those that act on their queries; the latter are forced to look elsewhere; the circuit is compared between
two sets of templates, with an unrelated task and with random sets; and heads found there are forced in
another task, colored objects, in which SmolLM2-135M-Instruct does not answer better than a guess, so that no
circuit can be looked for in it. The forcing is told which colours are wrong: it shows what a head does, and
is no repair that one could use. Status: agrees with the official code (with its option that holds MLPs); the
rules are our choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from regard.studies.base import Results, Step, Study
from regard.studies.claims import Claim, Quantity, Rule
from regard.studies.registry import study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome


@dataclass(frozen=True)
class Size:
    """How many seeds, prompts of a circuit, questions about colours."""

    seeds: int = 4
    prompts: int = 8
    questions: int = 32


def share(name: str, about: str) -> Quantity:
    return Quantity(name=name, about=about, low=0, high=1, unit="%")


def effect(name: str, about: str) -> Quantity:
    return Quantity(name=name, about=about, low=0)


def logits(name: str, about: str) -> Quantity:
    return Quantity(name=name, about=about, unit="logits")


def rule(
    comparison: str, measure: str, control: str | None, threshold: float = 0.0, factor: float = 1.0
) -> Rule:
    return Rule(
        comparison=comparison, measure=measure, control=control, threshold=threshold, factor=factor,
        paired=control is not None,
    )  # fmt: skip


above, below, within = (partial(rule, comparison) for comparison in ("above", "below", "within"))


@study("circuit-reuse")
class CircuitReuse(Study):
    """Which heads two tasks share, and what forcing them does."""

    title = "Circuit Component Reuse Across Tasks in Transformer Language Models"
    paper = "Merullo et al. 2023, arXiv 2310.08744"
    quantities = (
        effect("second", "|effect| of the second head on the movers' queries"),
        effect("third", "|effect| of the third head on the movers' queries"),
        share("leaders_s2", "weight from the end to the second subject, the lesser of the two leading heads"),
        share("others_s2", "the same, mean of the other heads of their layers"),
        logits("ld", "logit difference of indirect objects"),
        logits("ld_io", "the same, the two leaders forced onto the indirect object"),
        logits("ld_s2", "the same, the two leaders forced onto the second subject"),
        logits("ld_random", "the same, random heads of their layers forced onto the indirect object"),
        share("templates", "overlap of the circuits of two sets of templates"),
        share("weekday", "overlap of the circuits of indirect objects and of the next weekday"),
        share("random", "overlap of random sets of heads of the same sizes"),
        share("co", "colored objects: the right colour above both others"),
        share("co_wrong", "the same, the suppressor forced onto the two wrong colours"),
        share("co_right", "the same, the suppressor forced onto the right colour"),
        share("co_positions", "the same, the suppressor forced onto two random positions"),
        share("co_others", "the same, four random heads forced onto the wrong colours"),
        share("co_leaders", "the same, the two leading heads forced onto the wrong colours"),
        share("co_mover", "the same, the strongest mover forced onto the wrong colours"),
    )
    claims = (
        Claim(
            name="lead",
            text="Two heads act on the movers' queries, each at least three times as much as any other.",
            rules=(above("second", "third", factor=3),),
            main=True,
            paper="three inhibition heads in GPT-2 Medium",
        ),
        Claim(
            name="look",
            text="Both look from the end at the second subject, as no other head of their layers does.",
            rules=(above("leaders_s2", "others_s2", 0.2),),
            main=True,
            paper="inhibition heads attend to S2",
        ),
        Claim(
            name="force",
            text="Forced onto the indirect object they lower the logit difference by over a tenth, forced "
            "onto the second subject they do not, and random heads change it by less than a tenth.",
            rules=(
                below("ld_io", "ld", factor=0.9),
                above("ld_s2", "ld", factor=0.9),
                above("ld_random", "ld", factor=0.9),
                below("ld_random", "ld", factor=1.1),
            ),
            main=True,
        ),
        Claim(
            name="reuse",
            text="Two sets of templates share 60 % of their circuits, more than an unrelated task or chance.",
            rules=(
                above("templates", None, 0.6), above("templates", "weekday"), above("templates", "random"),
            ),
            main=True,
            paper="78 % between indirect objects and colored objects in GPT-2 Medium",
        ),
        Claim(
            name="colours",
            text="In colored objects the suppressor forced onto the wrong colours raises the accuracy by 20 "
            "points, onto the right one brings it below 10 %; random positions, other heads stay within 10.",
            rules=(
                above("co_wrong", "co", 0.2), below("co_right", None, 0.1),
                within("co_positions", "co", 0.1), within("co_others", "co", 0.1),
            ),
            main=True,
            paper="from 49.6 % to 78.1 % by the negative mover, to 93.7 % with the inhibition heads",
        ),
        Claim(
            name="leaders",
            text="The heads that act on the movers' queries help there too.",
            rules=(above("co_leaders", "co", 0.1),),
            paper="from 49.6 % to 81.5 %",
        ),
        Claim(
            name="mover",
            text="A mover promotes the wrong colours that it is forced onto.",
            rules=(below("co_mover", "co"),),
        ),
    )  # fmt: skip
    full = Size()
    quick = Size(seeds=1, prompts=2, questions=4)

    def prepare(self) -> None:
        import regard

        self.model, self.tokenizer = regard.load()

    def steps(self) -> Iterable[Step]:
        for seed in range(self.size.seeds):
            yield Step(f"circuits, seed {seed}", partial(self.circuits, seed), cost=5)

    def circuits(self, seed: int) -> dict[str, Any]:
        """Find the three circuits of a seed, and force their heads."""
        from regard.studies.circuit_reuse_parts import one_seed

        return one_seed(self.model, self.tokenizer, 1000 * self.seed + seed, self.size, self.tick)

    def measure(self, results: Results) -> Mapping[str, Sequence[float]]:
        found = list(results.values())
        return {each.name: [one["measures"][each.name] for one in found] for each in self.quantities}

    def details(self, results: Results) -> dict[str, Any]:
        from regard.studies.circuit_reuse_picture import collect

        return collect(results)

    def draw(self, outcome: Outcome, figure: Figure) -> None:
        from regard.studies.circuit_reuse_picture import draw

        draw(outcome, figure)
