"""Retrieval Head Mechanistically Explains Long-Context Factuality (Wu et al., 2024, arXiv 2404.15574).

    score_h = share of a hidden fact that head h copies while the model writes it, mean over facts answered

SmolLM2-135M-Instruct, texts of 192 tokens, 24 packaged facts that no model knows; every seed parts them in
two sets that share none, draws texts and depths anew, ranks the heads on the first set and switches the ten
leading ones off on the second. Set beside it: no head off; ten heads drawn from outside the first hundred,
three times; lists to be copied; facts the model knows without a text; perplexity of other texts. The paper
takes 7B and more, up to 50,000 tokens, 50 to 100 heads of 1,024, extractive and chain-of-thought questions.
Status: agrees with the official code (the score); the rules are ours, set before the run.
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

TASKS = {"needle": "a hidden fact", "copying": "the rest of a list", "knowing": "a known word"}
MASKS = {
    "": "no head off",
    "_top": "the ten leading heads off",
    "_random": "ten others off, mean of three draws",
}


@dataclass(frozen=True)
class Size:
    """Seeds; facts of each set, tokens of a text; lists, known words and passages; heads off, and draws."""

    seeds: int = 5
    facts: int = 12
    length: int = 192
    lists: int = 8
    known: int = 20
    passages: int = 6
    heads: int = 10
    draws: int = 3


def share(name: str, about: str) -> Quantity:
    return Quantity(name=name, about=about, low=0, high=1, unit="%")


def rule(comparison: str, measure: str, control: str | None, threshold: float = 0.0, **options: Any) -> Rule:
    paired = control is not None
    return Rule(
        comparison=comparison, measure=measure, control=control, threshold=threshold, paired=paired, **options
    )


above, below, within = (partial(rule, comparison) for comparison in ("above", "below", "within"))


@study("retrieval-heads")
class RetrievalHeads(Study):
    """Heads that copy facts out of a text: found, switched off, and held against others."""

    title = "Retrieval Head Mechanistically Explains Long-Context Factuality"
    paper = "Wu et al. 2024, arXiv 2404.15574"
    quantities = (
        *(
            share(f"{task}{mask}", f"{what} found again: recall of its words, {how}")
            for task, what in TASKS.items()
            for mask, how in MASKS.items()
        ),
        share("needle_far", "as needle_random, of the draw that is farthest from no head off"),
        share("needle_uniform", "as needle_top, heads made uniform and only where a token is chosen"),
        Quantity(name="perplexity", about="perplexity of other passages, no head off", low=1),
        Quantity(name="perplexity_top", about="the same, the ten leading heads off", low=1),
        Quantity(name="perplexity_random", about="the same, ten others off, mean of three draws", low=1),
        Quantity(name="correlation", about="rank correlation of the two sets' scores", low=-1, high=1),
        Quantity(
            name="correlation_shuffled", about="the same, one set's heads shuffled", low=-1, high=1
        ),
    )  # fmt: skip
    claims = (
        Claim(
            name="needle",
            text="With the ten leading heads off, at most half is found again; "
            "with ten others off, nearly all.",
            rules=(
                below("needle_top", "needle", factor=0.5),
                within("needle_far", "needle", 0.15),
            ),
            main=True,
            paper="50 top heads: below 50; 50 random heads: above 80",
        ),
        Claim(
            name="specific",
            text="The ten leading heads off hurt more than ten others.",
            rules=(below("needle_top", "needle_random"),),
            main=True,
        ),
        Claim(
            name="stable",
            text="Two sets of facts that share none rank the heads alike, at 0.6 or more.",
            rules=(above("correlation", None, 0.6), above("correlation", "correlation_shuffled")),
            main=True,
            paper="the same heads in other texts; no figure within one model",
        ),
        Claim(
            name="perplexity",
            text="Perplexity of other texts rises by less than 15 % with the leading heads off.",
            rules=(below("perplexity_top", "perplexity", factor=1.15),),
            main=True,
        ),
        Claim(
            name="knowing",
            text="What the model knows without a text, it still knows, within 15 points.",
            rules=(within("knowing_top", "knowing", 0.15),),
            paper="MMLU without chains of thought nearly unchanged",
        ),
        Claim(
            name="copying",
            text="Copying a list without being asked suffers too, more than with ten others off.",
            rules=(below("copying_top", "copying_random"),),
            paper="extractive questions, F1: 56.7 to 47.5 with 50 heads off, 55.7 with random ones",
        ),
        Claim(
            name="uniform",
            text="Uniform attention in these heads, only where a token is chosen, "
            "does at most as well as half.",
            rules=(below("needle_uniform", "needle", factor=0.5),),
            paper="what its code does, rather than zero",
        ),
    )
    full = Size()
    quick = Size(seeds=1, facts=2, length=96, lists=1, known=2, passages=1, draws=1)

    def prepare(self) -> None:
        import regard

        self.model, self.tokenizer = regard.load()

    def steps(self) -> Iterable[Step]:
        for seed in range(self.size.seeds):
            yield Step(f"seed {seed}", partial(self.one, seed), cost=100)

    def one(self, seed: int) -> dict[str, Any]:
        """Rank the heads on one set of facts, and switch the leading ones off on the other."""
        from regard.studies.retrieval_heads_parts import measured

        return measured(self.model, self.tokenizer, self.size, 1000 * self.seed + seed, self.tick)

    def measure(self, results: Results) -> Mapping[str, Sequence[float]]:
        runs = list(results.values())
        names = [f"{task}{mask}" for task in (*TASKS, "perplexity") for mask in MASKS]
        found = {
            name: [
                run[name] if isinstance(run[name], float) else sum(run[name]) / len(run[name]) for run in runs
            ]
            for name in names
        }
        far = [farthest(run["needle_random"], run["needle"]) for run in runs]
        rest = ("needle_uniform", "correlation", "correlation_shuffled")
        return {**found, "needle_far": far, **{name: [run[name] for run in runs] for name in rest}}

    def details(self, results: Results) -> dict[str, Any]:
        from regard.studies.retrieval_heads_picture import collect

        return collect(list(results.values()))

    def draw(self, outcome: Outcome, figure: Figure) -> None:
        from regard.studies.retrieval_heads_picture import draw

        draw(outcome, figure)


def farthest(values: Sequence[float], start: float) -> float:
    """Return the value that lies farthest from `start`."""
    return max(values, key=lambda value: abs(value - start))
