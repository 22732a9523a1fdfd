"""Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through
Attention Calibration (Yu et al., 2024, ICML 2024, arXiv 2406.15765).

SmolLM2-135M-Instruct says whether a made sentence is positive or negative. Every seed parts the adjectives
anew: heads of every third layer in which ACT raises accuracy on one half are kept, and ACT is used in them on
the other. Beside it: as many random heads, three times; the first token in place of the hidden sinks, in the
same heads; a temperature of the same heads that moves as much weight; ACT in all heads; and hidden sinks, or
the first token, deleted in all heads. Items are pooled over seeds. Log-losses are those of two balanced
classes, after the label bias of each treatment, midway between the classes of the calibration prompts, is
gone: a model that leans to one label gains accuracy from anything that moves it.
Status: partly our choice: the paper has 7B to 30B models and up to 900 prompts of each of 9 or 7 data sets.
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

TREATMENTS = {
    "plain": "the model as it is",
    "filtered": "ACT in the heads kept",
    "random": "ACT in as many others, mean of three draws",
    "first": "the first token in place of hidden sinks, in the heads kept",
    "temperature": "a temperature of the heads kept that moves as much weight",
    "all": "ACT in all heads of layers 2 to 28",
    "delete_hidden": "hidden sinks deleted in all these heads",
    "delete_first": "the first token deleted in all these heads",
}


@dataclass(frozen=True)
class Size:
    """Seeds; prompts to calibrate and test on, and whose sinks are counted; layers whose heads are tried."""

    seeds: int = 3
    calibration: int = 16
    test: int = 32
    counted: int = 10
    layers: tuple[int, ...] = (2, 5, 8, 11, 14, 17, 20, 23, 26)


def rule(comparison: str, measure: str, control: str | None, threshold: float = 0.0, **options: Any) -> Rule:
    return Rule(
        comparison=comparison, measure=measure, control=control, threshold=threshold,
        paired=options.pop("paired", control is not None), **options,
    )  # fmt: skip


above, below = (partial(rule, comparison) for comparison in ("above", "below"))


@study("attention-calibration")
class AttentionCalibration(Study):
    """Attention taken from hidden sinks in chosen heads, beside what else might do the same."""

    title = (
        "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training "
        "through Attention Calibration"
    )
    paper = "Yu et al. 2024, arXiv 2406.15765"
    quantities = (
        *(
            Quantity(name=name, about=f"right answers, {what}", over="items", low=0, high=1, unit="%")
            for name, what in TREATMENTS.items()
        ),
        *(
            Quantity(
                name=f"loss_{name}", about=f"log-loss without label bias, {what}", over="items", low=0,
                unit="nats",
            )
            for name, what in TREATMENTS.items()
        ),
        Quantity(name="kept", about="heads kept", low=0),
        Quantity(name="chance", about="heads kept if ACT did no more good than harm", low=0),
        Quantity(name="hidden", about="heads with a hidden sink", over="texts", low=0, high=1, unit="%"),
        Quantity(
            name="hidden_random", about="the same with random weights", over="texts", low=0, high=1, unit="%"
        ),
    )  # fmt: skip
    claims = (
        Claim(
            name="sinks",
            text="Many heads have sinks beyond the first token; with random weights hardly any have.",
            rules=(above("hidden", None, 0.3), below("hidden_random", "hidden", factor=0.2)),
            main=True,
            paper="in the middle layers of Llama-2-7B",
        ),
        Claim(
            name="first",
            text="Deleting the first token's attention in all heads is worse than deleting "
            "the hidden sinks'.",
            rules=(
                below("delete_first", "delete_hidden"), above("loss_delete_first", "loss_delete_hidden"),
            ),
            main=True,
            paper="removing the first token's sink hurts",
        ),
        Claim(
            name="helps",
            text="On held-out items ACT in the heads kept is not less accurate than the model as it is.",
            rules=(above("filtered", "plain", -0.01),),
            main=True,
            paper="up to +7.30 % on average",
        ),
        Claim(
            name="specific",
            text="It is better than ACT in random heads and than an equal temperature of the same heads, in "
            "accuracy and in loss.",
            rules=(
                above("filtered", "random"), above("filtered", "temperature"),
                below("loss_filtered", "loss_random"), below("loss_filtered", "loss_temperature"),
            ),
            main=True,
        ),
        Claim(
            name="gains",
            text="It is more accurate than the model as it is.",
            rules=(above("filtered", "plain"),),
        ),
        Claim(
            name="unbiased",
            text="It tells the classes better apart, its label bias gone.",
            rules=(below("loss_filtered", "loss_plain"),),
        ),
        Claim(
            name="hidden",
            text="It is the hidden sinks: the first token in their place helps less, in loss.",
            rules=(below("loss_filtered", "loss_first"),),
        ),
        Claim(
            name="choosing",
            text="Choosing heads is better than all heads, in loss.",
            rules=(below("loss_filtered", "loss_all"),),
            paper="all heads hurt",
        ),
        Claim(
            name="chance",
            text="More heads raise accuracy than would by chance.",
            rules=(above("kept", "chance"),),
        ),
    )  # fmt: skip
    full = Size()
    quick = Size(seeds=1, calibration=4, test=6, counted=1, layers=(28,))

    def prepare(self) -> None:
        import regard

        self.model, self.tokenizer = regard.load()

    def steps(self) -> Iterable[Step]:
        yield Step("sinks", self.sinks, cost=self.size.counted)
        for seed in range(self.size.seeds):
            yield Step(f"seed {seed}", partial(self.one, seed), cost=300)

    def sinks(self) -> dict[str, list[float]]:
        """Count the heads with hidden sinks, in the model and with random weights."""
        from regard.studies.attention_calibration_parts import hidden, untrained
        from regard.tasks.sentiment import sentiment

        prompts = [text for text, _ in sentiment(self.size.counted, 2, seed=self.seed).calibration]
        fresh = untrained(self.model)
        return {
            "hidden": hidden(self.model, self.tokenizer, prompts),
            "hidden_random": hidden(fresh, self.tokenizer, prompts),
        }

    def one(self, seed: int) -> dict[str, Any]:
        """Choose heads on one set of prompts, and score every treatment on another."""
        from regard.studies.attention_calibration_parts import one_seed

        return one_seed(self.model, self.tokenizer, self.size, 1000 * self.seed + seed, self.tick)

    def measure(self, results: Results) -> Mapping[str, Sequence[float]]:
        from regard.studies.attention_calibration_parts import scores

        runs = [told for name, told in results.items() if name.startswith("seed")]
        items: dict[str, list[float]] = {}
        for run in runs:
            for name, (right, loss) in scores(run).items():
                items.setdefault(name, []).extend(right)
                items.setdefault(f"loss_{name}", []).extend(loss)
        return {
            **items,
            "kept": [float(len(run["heads"])) for run in runs],
            "chance": [run["chance"][0] for run in runs],
            **results["sinks"],
        }

    def details(self, results: Results) -> dict[str, Any]:
        from regard.studies.attention_calibration_parts import compared

        runs = [told for name, told in results.items() if name.startswith("seed")]
        return {
            "compared": compared(self.measure(results)),
            "heads": [run["heads"] for run in runs],
            "calibration": [run["plain"] for run in runs],
            "chance": [run["chance"] for run in runs],
            "temperatures": [run["temperatures"] for run in runs],
            "tried": [run["tried"] for run in runs],
        }

    def draw(self, outcome: Outcome, figure: Figure) -> None:
        from regard.studies.attention_calibration_picture import draw

        draw(outcome, figure)
