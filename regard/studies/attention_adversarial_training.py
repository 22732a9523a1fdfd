"""Attention Meets Perturbations: adversarial training on attention scores (Kitada, Iyatomi, 2009.12064).

Sentences of made words with a few cue words (5 % of the labels wrong), and sentences of two novels; a
BiLSTM of 32 a direction with tanh attention, eps 5 in units of scores, lambda 1. `none` is plain training,
`random` a random perturbation of the same length, `published` what the official code computes, the step
reversed. An attack is the worst of five gradient steps of length eps. Rules by a pilot of four seeds; "no
worse" is within 0.03, its deviation of accuracy between seeds. Status: our choice of tasks and sizes.
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

EPS = 5.0
CONDITIONS = {
    "small": ("none", "random", "at", "sign", "published"),
    "large": ("none", "random", "at", "published"),
    "novels": ("none", "random", "at"),
}
SAID = {"small": "400 made sentences", "large": "1,500 made sentences", "novels": "sentences of novels"}
SHARES = {"accuracy": "held-out accuracy", "attacked": "accuracy under the attack, eps 5"}


@dataclass(frozen=True)
class Size:
    """Seeds, sentences and epochs of each task."""

    seeds: int = 6
    small: int = 400
    small_epochs: int = 20
    more_seeds: int = 3
    large: int = 1500
    large_epochs: int = 12
    novels: int = 1000
    novels_epochs: int = 8
    held_out: int = 500


def quantities() -> Iterable[Quantity]:
    for task, names in CONDITIONS.items():
        for name in names:
            about = f"{name}, {SAID[task]}"
            for kind, said in SHARES.items():
                yield Quantity(
                    name=f"{task}_{name}_{kind}", about=f"{said}, {about}", low=0, high=1, unit="%"
                )
            yield Quantity(name=f"{task}_{name}_loss", about=f"loss under it, {about}", low=0, unit="nats")
            yield Quantity(
                name=f"{task}_{name}_correlation", about=f"attention and gradients, {about}", low=-1, high=1
            )
    for name in ("at", "published"):
        yield Quantity(
            name=f"raised_{name}",
            about=f"texts whose loss {name} raises, plain model",
            low=0,
            high=1,
            unit="%",
        )


def over(measure: str, control: str, threshold: float = 0.0) -> Rule:
    return Rule(measure=measure, comparison="above", threshold=threshold, control=control, paired=True)


def under(measure: str, control: str) -> Rule:
    return Rule(measure=measure, comparison="below", threshold=0.0, control=control, paired=True)


def robust(task: str) -> tuple[Rule, ...]:
    return tuple(
        rule
        for control in ("none", "random")
        for rule in (
            over(f"{task}_at_attacked", f"{task}_{control}_attacked"),
            under(f"{task}_at_loss", f"{task}_{control}_loss"),
        )
    )


@study("attention-adversarial-training")
class AttentionAdversarialTraining(Study):
    """Does training against perturbed attention make it hard to upset, and does it make it easier to read?"""

    title = "Attention Meets Perturbations: Robust and Interpretable Attention with Adversarial Training"
    paper = "Kitada and Iyatomi 2020, arXiv 2009.12064"
    quantities = tuple(quantities())
    claims = (
        Claim(
            name="robust",
            text="Attention AT bears the attack better than plain training and than random perturbation.",
            rules=robust("small"),
            main=True,
            paper="attention is more robust to perturbation",
        ),
        Claim(
            name="no worse",
            text="Held-out accuracy without an attack is no worse.",
            rules=(over("small_at_accuracy", "small_none_accuracy", -0.03),),
            main=True,
            paper="better on nine of ten datasets",
        ),
        Claim(
            name="robust, 1,500",
            text="With 1,500 sentences it bears the attack better as well.",
            rules=robust("large"),
        ),
        Claim(
            name="robust, novels",
            text="On sentences of novels it bears the attack better as well.",
            rules=robust("novels"),
        ),
        Claim(
            name="direction",
            text="The step of `at` raises the loss, that of the published code lowers it.",
            rules=(
                Rule(measure="raised_at", comparison="above", threshold=0.9),
                Rule(measure="raised_published", comparison="below", threshold=0.1),
                over("raised_at", "raised_published", 0.5),
            ),
        ),
        Claim(
            name="published is not robust",
            text="Training with the published code's step bears the attack worse than plain training.",
            rules=(under("small_published_attacked", "small_none_attacked"),),
        ),
        Claim(
            name="readable",
            text="Attention AT correlates more with gradient importance than plain training and random do.",
            rules=tuple(
                over("small_at_correlation", f"small_{c}_correlation") for c in ("none", "random")
            ),
            paper="higher correlation than plain, word-level AT and random on all datasets",
        ),
        Claim(
            name="readable by the sign",
            text="The published code's step raises that correlation.",
            rules=(over("small_published_correlation", "small_none_correlation"),),
            paper="its figures come from this code",
        ),
    )  # fmt: skip
    full = Size()
    quick = Size(
        seeds=1, small=32, small_epochs=1, more_seeds=1, large=32, large_epochs=1, novels=32, novels_epochs=1,
        held_out=20,
    )  # fmt: skip

    def steps(self) -> Iterable[Step]:
        costs = {"small": 1.0, "large": 2.2, "novels": 1.2}
        for task, names in CONDITIONS.items():
            for seed in range(self.size.seeds if task == "small" else self.size.more_seeds):
                for name in names:
                    yield Step(
                        f"{task}, {name}, seed {seed}", partial(self.run, task, name, seed), cost=costs[task]
                    )

    def run(self, task: str, name: str, seed: int) -> dict[str, Any]:
        """Train and attack one classifier."""
        from regard.studies.adversarial_attention_parts import trained_and_judged
        from regard.tasks.cue_words import cue_sentences
        from regard.tasks.labelled import sentences

        size, seed = self.size, 1000 * self.seed + seed
        count, epochs = getattr(size, task), getattr(size, f"{task}_epochs")
        make = sentences if task == "novels" else cue_sentences
        data = make(count, size.held_out, seed=seed)
        return trained_and_judged(data, name, epochs=epochs, eps=EPS, seed=seed, tick=self.tick)

    def measure(self, results: Results) -> Mapping[str, Sequence[float]]:
        found: dict[str, list[float]] = {}
        for task, names in CONDITIONS.items():
            for name in names:
                runs = of_condition(results, task, name)
                found |= {
                    f"{task}_{name}_accuracy": [run["accuracy"] for run in runs],
                    f"{task}_{name}_attacked": [run["attacked"]["5"] for run in runs],
                    f"{task}_{name}_loss": [run["loss"]["5"] for run in runs],
                    f"{task}_{name}_correlation": [run["correlation"] for run in runs],
                }
        plain = of_condition(results, "small", "none")
        for name in ("at", "published"):
            found[f"raised_{name}"] = [run["directions"][name] for run in plain]
        return found

    def details(self, results: Results) -> dict[str, Any]:
        return {
            task: {name: summary(of_condition(results, task, name)) for name in names}
            for task, names in CONDITIONS.items()
        }

    def draw(self, outcome: Outcome, figure: Figure) -> None:
        from regard.studies.adversarial_attention_picture import draw

        draw(outcome, figure, "small", CONDITIONS["small"])


def of_condition(results: Results, task: str, name: str) -> list[dict[str, Any]]:
    """Return the runs of a condition, a seed each."""
    return [run for step, run in results.items() if step.startswith(f"{task}, {name}, ")]


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return means over seeds: accuracy by eps, and what attention is like."""
    curves = {
        key: {eps: sum(run[key][eps] for run in runs) / len(runs) for eps in runs[0][key]}
        for key in ("attacked", "random")
    }
    means: dict[str, Any] = {
        key: sum(run[key] for run in runs) / len(runs)
        for key in ("entropy", "mass", "auprc")
        if key in runs[0]
    }
    return {**curves, **means}
