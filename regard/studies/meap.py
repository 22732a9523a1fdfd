"""Mask-Enhanced Autoregressive Prediction: Pay Less Attention to Learn More (Zhuang et al., 2502.07490).

Small models learn texts of 64 tokens: filler from a Markov chain, four facts in it, and the four questions
for them at the end (`regard.tasks.filler_facts`). Three arms from the same weights, on the same batches, for
as many steps: plain next-token prediction; MEAP with 15 % of the inputs hidden; and the control, where as
many are replaced by random tokens instead. Loss, answers and attention are measured on held-out filler, clean
but where masked keys are asked about: there all arms read the same inputs with the same 15 % hidden.

Answers are compared over the evaluations at which plain training has 30 to 80 % of them right, in that seed;
later both know all. The paper takes 1.1 B parameters and 40 to 200 B tokens, contexts of 4,096 and more.
Status: the sizes are our choice, found with plain training alone on another seed; the rules are those of our
specification, set before the first run with MEAP. The model (`regard.models.tiny`) has a short convolution
before its two layers: without it, none of this size learned to answer in so few steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from regard.studies.base import Results, Step, Study
from regard.studies.claims import Claim, Quantity, Rule
from regard.studies.registry import study
from regard.studies.threads import one_thread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

ARMS = {
    "plain": "plain next-token prediction",
    "meap": "15 % of the inputs hidden",
    "random": "15 % of the inputs replaced by random tokens",
}
LEARNING = (0.3, 0.8)


@dataclass(frozen=True)
class Size:
    """Seeds; steps of training, and between evaluations; held-out sequences; steps compared exactly."""

    seeds: int = 5
    steps: int = 1000
    every: int = 20
    held_out: int = 256
    exact: int = 10


def rule(comparison: str, measure: str, control: str, threshold: float = 0.0, **options: Any) -> Rule:
    return Rule(
        comparison=comparison, measure=measure, control=control, threshold=threshold, paired=True, **options
    )


above, below, within = (partial(rule, comparison) for comparison in ("above", "below", "within"))


def share(name: str, about: str) -> Quantity:
    return Quantity(name=name, about=about, low=0, high=1, unit="%")


def of_arms(kind: str, about: str, unit: str = "%", high: float = 1.0) -> list[Quantity]:
    return [
        Quantity(name=f"{kind}_{arm}", about=f"{about}, {told}", low=0, high=high, unit=unit)
        for arm, told in ARMS.items()
    ]


@study("meap")
class MEAPStudy(Study):
    """Does hiding inputs move attention away from them, and help to find facts, more than noise does?"""

    title = "Mask-Enhanced Autoregressive Prediction: Pay Less Attention to Learn More"
    paper = "Zhuang et al. 2025, arXiv 2502.07490"
    quantities = (
        *of_arms("answers", "questions answered while plain training has 30 to 80 %"),
        *of_arms("curve", "questions answered, mean over the whole training"),
        *of_arms("end", "questions answered at the end"),
        *of_arms("filler", "loss on clean filler at the end", "nats", float("inf")),
        *of_arms("masked", "mean attention that a masked key receives"),
        *of_arms("spread", "variance of the attention that other keys receive", "", float("inf")),
        *of_arms("fact", "attention from a question on the fact asked for, at the end"),
        share("fact_even", "what even attention would give the fact"),
        Quantity(name="same", about="largest difference of weights, ratio 0 against plain training", low=0),
        Quantity(name="changed", about="the same, ratio 0.15", low=0),
    )  # fmt: skip
    claims = (
        Claim(
            name="exact",
            text="With ratio 0 it is plain training bit for bit, and with 0.15 it is not.",
            rules=(
                Rule(measure="same", comparison="below", threshold=1e-12),
                above("changed", "same", 1e-6),
            ),
            main=True,
        ),
        Claim(
            name="masked keys",
            text="Masked keys receive less attention than after plain training, or training with noise.",
            rules=(below("masked_meap", "masked_plain"), below("masked_meap", "masked_random")),
            main=True,
            paper="53.3 % less at 4,096 tokens, 1.1 B parameters; no such control",
        ),
        Claim(
            name="clean loss",
            text="Loss on clean filler rises by less than 3 %.",
            rules=(below("filler_meap", "filler_plain", factor=1.03),),
            main=True,
            paper="no worse in perplexity",
        ),
        Claim(
            name="retrieval",
            text="While plain training learns to answer, MEAP answers more.",
            rules=(above("answers_meap", "answers_plain"),),
            main=True,
            paper="needle in a haystack, 60 B tokens: 85.8 against 52.8 %",
        ),
        Claim(
            name="not noise",
            text="It answers more than training with as many random tokens.",
            rules=(above("answers_meap", "answers_random"), above("curve_meap", "curve_random")),
            main=True,
            paper="no such control",
        ),
        Claim(
            name="whole curve",
            text="Over the whole training, MEAP answers more than plain training.",
            rules=(above("curve_meap", "curve_plain"),),
        ),
        Claim(
            name="spread",
            text="Attention varies more over the keys that are not masked.",
            rules=(above("spread_meap", "spread_plain"),),
            paper="7.8 % more",
        ),
        Claim(
            name="fact",
            text="A question gives more attention to the fact it asks for.",
            rules=(above("fact_meap", "fact_plain"),),
            paper="9.4 to 34.5 % on the answer's span",
        ),
    )
    full = Size()
    quick = Size(seeds=1, steps=8, every=4, held_out=16, exact=2)

    def steps(self) -> Iterable[Step]:
        for seed in range(self.size.seeds):
            yield Step(f"exact, seed {seed}", partial(self.exact, seed), cost=0.04)
            for arm in ARMS:
                yield Step(f"{arm}, seed {seed}", partial(self.trained, arm, seed))

    def exact(self, seed: int) -> dict[str, float]:
        """Compare a few steps at ratio 0 and 0.15 with plain training."""
        from regard.studies.meap_parts import exact

        with one_thread():
            return exact(1000 * self.seed + seed, self.size.exact)

    def trained(self, arm: str, seed: int) -> dict[str, Any]:
        """Train an arm, and return its curves and attention."""
        from regard.studies.meap_parts import trained

        size = self.size
        with one_thread():
            return trained(arm, 1000 * self.seed + seed, size.steps, size.every, size.held_out, self.tick)

    def measure(self, results: Results) -> Mapping[str, Sequence[float]]:
        runs = sorted_out(results)
        windows = [learning(run["answers"]) for run in runs["plain"]]
        found: dict[str, list[float]] = {}
        for arm, told in runs.items():
            found[f"answers_{arm}"] = [
                mean_at(run["answers"], at) for run, at in zip(told, windows, strict=True)
            ]
            found[f"curve_{arm}"] = [mean_at(run["answers"], range(len(run["answers"]))) for run in told]
            found[f"end_{arm}"] = [run["answers"][-1] for run in told]
            found[f"filler_{arm}"] = [run["filler"][-1] for run in told]
            for name in ("masked", "spread", "fact"):
                found[f"{name}_{arm}"] = [run[name] for run in told]
        found["fact_even"] = [run["fact_even"] for run in runs["plain"]]
        exact = [told for name, told in results.items() if name.startswith("exact")]
        return {**found, **{name: [told[name] for told in exact] for name in ("same", "changed")}}

    def details(self, results: Results) -> dict[str, Any]:
        from regard.studies.meap_picture import collect

        return collect(sorted_out(results), LEARNING)

    def draw(self, outcome: Outcome, figure: Figure) -> None:
        from regard.studies.meap_picture import draw

        draw(outcome, figure)


def sorted_out(results: Results) -> dict[str, list[Any]]:
    """Return the results of the trainings, arm -> one a seed."""
    return {arm: [told for name, told in results.items() if name.startswith(f"{arm}, ")] for arm in ARMS}


def learning(answers: Sequence[float]) -> list[int]:
    """Return the evaluations at which a share of right answers is from 30 to 80 %."""
    return [at for at, right in enumerate(answers) if LEARNING[0] <= right <= LEARNING[1]]


def mean_at(values: Sequence[float], places: Iterable[int]) -> float:
    """Return the mean of some values; NaN for none."""
    chosen = [values[place] for place in places]
    return sum(chosen) / len(chosen) if chosen else float("nan")
