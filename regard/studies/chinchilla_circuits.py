"""Does Circuit Analysis Interpretability Scale? (Lieberum et al., 2023, arXiv 2307.09458).

    q' = mean + V_r V_r^T (q - mean)        queries at the last position; the same for keys at the labels

A transformer of three layers learns symbolic multiple choice from scratch, with labels A to D or letters
drawn anew. Its logits are taken apart, and queries and keys of the layer whose heads look most at the right
label are kept to r directions: fitted ones, those fitted on the other kind of labels, and random ones.
SmolLM2-135M-Instruct is asked by label and by content: it cannot do the first, so nothing is claimed of its
label heads. Status: sizes and rules are our choice; the paper takes Chinchilla 70B and MMLU.
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

KINDS = {"ordered": "labels A to D", "random": "letters drawn"}
RANKS = (0, 1, 2, 3, 4, 8, 16)


@dataclass(frozen=True)
class Size:
    """Models, and steps of training; prompts to fit on and to test; draws; question sets, and questions."""

    seeds: int = 3
    steps: int = 2250
    batch: int = 128
    fitted: int = 512
    tested: int = 512
    draws: int = 10
    sets: int = 5
    questions: int = 40


def share(name: str, about: str, over: str = "seeds") -> Quantity:
    return Quantity(name=name, about=about, over=over, low=0, high=1, unit="%")


def logits(name: str, about: str, **options: Any) -> Quantity:
    return Quantity(name=name, about=about, unit="logits", **options)


def cosine(name: str, about: str) -> Quantity:
    return Quantity(name=name, about=about, low=-1, high=1)


def rule(measure: str, comparison: str, control: str | None, threshold: float = 0.0, **options: Any) -> Rule:
    return Rule(
        measure=measure, comparison=comparison, control=control, threshold=threshold,
        paired=control is not None, **options,
    )  # fmt: skip


LEARNT = (rule("ordered_full", "above", None, 0.95), rule("random_full", "above", None, 0.9))


@study("chinchilla-circuits")
class ChinchillaCircuits(Study):
    """What carries the right label, in how few directions, and whether other letters find the same ones."""

    title = (
        "Does Circuit Analysis Interpretability Scale? "
        "Evidence from Multiple Choice Capabilities in Chinchilla"
    )
    paper = "Lieberum et al. 2023, arXiv 2307.09458"
    quantities = (
        *(share(f"{kind}_full", f"accuracy, {about}") for kind, about in KINDS.items()),
        *(
            share(f"{kind}_{r}", f"accuracy, {about}, rank {r}")
            for kind, about in KINDS.items()
            for r in RANKS
        ),
        share("crossed_3", "accuracy, labels A to D, rank 3 fitted on letters drawn"),
        share("one_head_0", "accuracy, labels A to D, one head at rank 0"),
        share("drawn_3", "accuracy, labels A to D, rank 3, mean of random directions"),
        logits("net_full", "net logit, labels A to D"),
        logits("net_3", "net logit, labels A to D, rank 3"),
        logits("net_drawn", "net logit, labels A to D, rank 3, best of random directions"),
        cosine("same", "cosine of key centroids, A to D and letters drawn, same place"),
        cosine("other", "the same, other places"),
        share("between", "output nodes shared by labels A to D and letters drawn, of their union"),
        share("within", "output nodes shared by two halves of the prompts with A to D, of their union"),
        logits("diagonal", "largest mean diagonal of a head's effects, labels A to D"),
        logits("diagonal_shuffled", "the same head's, right places shuffled"),
        logits("error", "sum of the parts less the logits, largest", low=0),
        logits("averaged", "the same with one scale of the norm for all prompts", low=0),
        logits("real_error", "sum of the parts less SmolLM2's logits, largest", low=0, over="sets"),
        share("label", "SmolLM2, right by the label, of four", "sets"),
        share("content", "SmolLM2, right by the content", "sets"),
    )  # fmt: skip
    claims = (
        Claim(
            name="exact",
            text=(
                "Heads, MLPs and embedding add up to the logits, "
                "where the norm's scale is that of each prompt."
            ),
            rules=(
                rule("error", "below", None, 1e-3),
                rule("real_error", "below", None, 1e-3),
                rule("error", "below", "averaged", factor=0.01),
            ),
            main=True,
        ),
        Claim(
            name="rank",
            text="Three directions of queries and keys are enough for four labels, and none is not.",
            rules=(
                rule("ordered_3", "within", "ordered_full", 0.05),
                rule("ordered_0", "below", "ordered_full", factor=0.5),
            ),
            needs=LEARNT, main=True, paper="rank 3 without loss",
        ),
        Claim(
            name="fitted",
            text="The fitted three directions beat the best of ten random draws in net logit.",
            rules=(rule("net_3", "above", "net_drawn"),),
            needs=LEARNT, main=True,
        ),
        Claim(
            name="transfer",
            text="Directions fitted on A to D serve letters drawn, and the other way round.",
            rules=(
                rule("random_3", "within", "random_full", 0.05),
                rule("crossed_3", "within", "ordered_full", 0.05),
            ),
            needs=LEARNT, paper="random letters keep part of the effect",
        ),
        Claim(
            name="item",
            text="Keys of the n-th label point the same way whatever the letter: an n-th-item feature.",
            rules=(rule("same", "above", "other", 0.5),),
            needs=LEARNT,
        ),
        Claim(
            name="nodes",
            text="Letters drawn are answered by partly other output nodes than A to D.",
            rules=(rule("between", "below", "within"),),
            needs=LEARNT,
        ),
        Claim(
            name="alone",
            text="One head at rank 0 costs little where others do the same: alone it proves nothing.",
            rules=(rule("one_head_0", "above", "ordered_0", 0.3),),
            needs=LEARNT,
        ),
        Claim(
            name="letters",
            text="A head that carries the right label does so by the answer, not by its size.",
            rules=(rule("diagonal_shuffled", "below", "diagonal", factor=0.5),),
            needs=LEARNT,
        ),
        Claim(
            name="content",
            text="SmolLM2-135M knows the content and fails the labels.",
            rules=(
                rule("label", "below", None, 0.35),
                rule("content", "above", None, 0.4),
                rule("content", "above", "label"),
            ),
            paper="7B is at chance by label, above it by content",
        ),
    )  # fmt: skip
    full = Size()
    quick = Size(seeds=1, steps=40, batch=32, fitted=64, tested=64, draws=2, sets=1, questions=4)

    def prepare(self) -> None:
        import regard

        self.model, self.tokenizer = regard.load()

    def steps(self) -> Iterable[Step]:
        for seed in range(self.size.seeds):
            yield Step(f"symbols, seed {seed}", partial(self.symbols, seed), cost=self.size.steps / 15)
        for number in range(self.size.sets):
            yield Step(f"words, set {number}", partial(self.words, number), cost=self.size.questions)

    def symbols(self, seed: int) -> dict[str, Any]:
        """Train a model, and look into it."""
        from regard.studies.chinchilla_circuits_parts import looked_into, trained
        from regard.studies.threads import one_thread

        with one_thread():
            model = trained(1000 * self.seed + seed, self.size.steps, self.size.batch, self.tick)
            return looked_into(model, 1000 * self.seed + seed, self.size, RANKS)

    def words(self, number: int) -> dict[str, Any]:
        """Ask the pretrained model, by label and by content; take its logits apart."""
        import torch

        from regard.lens.circuits.choosing import answer_choices
        from regard.runtime.attribution import attribute_logits
        from regard.tasks.questions import choices, simple_questions

        asked = choices(self.tokenizer, simple_questions(self.size.questions, seed=1000 * self.seed + number))
        answered = answer_choices(self.model, asked, tokenizer=self.tokenizer)
        rows = asked.by_length()[0][:4]
        ids = torch.stack([asked.ids[i] for i in rows])
        parts = attribute_logits(self.model, {"input_ids": ids}, asked.label_ids[rows])
        return {
            "label": answered.by_label, "content": answered.by_content, "favourite": answered.favourite,
            "error": float((parts.total - parts.logits).abs().max()),
        }  # fmt: skip

    def measure(self, results: Results) -> Mapping[str, Sequence[float]]:
        runs = [told for step, told in results.items() if step.startswith("symbols")]
        sets = [told for step, told in results.items() if step.startswith("words")]
        names = [q.name for q in self.quantities if q.over == "seeds"]
        return {
            **{name: [run["measures"][name] for run in runs] for name in names},
            "real_error": [told["error"] for told in sets],
            "label": [told["label"] for told in sets],
            "content": [told["content"] for told in sets],
        }

    def details(self, results: Results) -> dict[str, Any]:
        runs = [told for step, told in results.items() if step.startswith("symbols")]
        sets = [told for step, told in results.items() if step.startswith("words")]
        return {
            "ranks": list(RANKS),
            "runs": [{name: told for name, told in run.items() if name != "measures"} for run in runs],
            "favourite": [told["favourite"] for told in sets],
        }

    def draw(self, outcome: Outcome, figure: Figure) -> None:
        from regard.studies.chinchilla_circuits_picture import draw

        draw(outcome, figure)
