"""Attention VAT: perturbed attention without labels (Kitada and Iyatomi, 2021, arXiv 2104.08763).

400 sentences of made words with a few cue words (5 % of the labels wrong) and 3,000 without labels; a BiLSTM
of 32 a direction with tanh attention; eps 5 and xi 1 in units of scores, one power step, lambda 1 after an
epoch. `random_vat` moves scores at random, over the same texts; `plain` has texts without a cue in the
place of the unlabelled. The attack is the worst of five gradient steps; its loss is at eps 1, its accuracy
at 5. Rules by a pilot of four seeds; "no worse" is within 0.03, its deviation of accuracy between seeds.
Status: our choice of task and sizes.
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
    "none": "plain training",
    "random_vat": "random perturbation, unlabelled texts too",
    "at": "AT, with labels",
    "vat": "VAT, labelled texts alone",
    "unlabelled": "VAT, unlabelled texts too",
    "plain": "VAT, texts without cues too",
}
MEASURES = {
    "accuracy": ("held-out accuracy", "%"),
    "attacked": ("accuracy under the attack, eps 5", "%"),
    "mass": ("attention on cue words", "%"),
}


@dataclass(frozen=True)
class Size:
    """Seeds, sentences with and without labels, epochs."""

    seeds: int = 5
    labelled: int = 400
    unlabelled: int = 3000
    epochs: int = 20
    held_out: int = 500


def quantities() -> Iterable[Quantity]:
    for name, said in CONDITIONS.items():
        for kind, (about, unit) in MEASURES.items():
            yield Quantity(name=f"cues_{name}_{kind}", about=f"{about}, {said}", low=0, high=1, unit=unit)
        yield Quantity(name=f"cues_{name}_loss", about=f"loss under it, eps 1, {said}", low=0, unit="nats")
        yield Quantity(
            name=f"cues_{name}_correlation", about=f"attention and gradients, {said}", low=-1, high=1
        )
    yield Quantity(
        name="power_share", about="texts that a power step moves more than its start, plain model",
        low=0, high=1, unit="%",
    )  # fmt: skip
    yield Quantity(name="power_kl", about="KL after a power step, eps 1, plain model", low=0, unit="nats")
    yield Quantity(name="start_kl", about="KL of the random start, eps 1, plain model", low=0, unit="nats")


def over(measure: str, control: str, threshold: float = 0.0) -> Rule:
    return Rule(measure=measure, comparison="above", threshold=threshold, control=control, paired=True)


def under(measure: str, control: str) -> Rule:
    return Rule(measure=measure, comparison="below", threshold=0.0, control=control, paired=True)


@study("attention-virtual-adversarial-training")
class AttentionVirtualAdversarialTraining(Study):
    """Do texts without labels make attention harder to upset, and point it at the words that matter?"""

    title = "Making Attention Mechanisms More Robust and Interpretable with Virtual Adversarial Training"
    paper = "Kitada and Iyatomi 2021, arXiv 2104.08763"
    quantities = tuple(quantities())
    claims = (
        Claim(
            name="robust",
            text="VAT with unlabelled texts bears the attack better than plain training and than random.",
            rules=tuple(
                rule
                for control in ("none", "random_vat")
                for rule in (
                    over("cues_unlabelled_attacked", f"cues_{control}_attacked"),
                    under("cues_unlabelled_loss", f"cues_{control}_loss"),
                )
            ),
            main=True,
        ),
        Claim(
            name="unlabelled texts help",
            text="It bears it better than VAT on the labelled texts alone.",
            rules=(under("cues_unlabelled_loss", "cues_vat_loss"),),
            main=True,
            paper="gains grow with the amount of unlabelled data",
        ),
        Claim(
            name="no worse",
            text="Held-out accuracy without an attack is no worse than of plain training.",
            rules=(over("cues_unlabelled_accuracy", "cues_none_accuracy", -0.03),),
            main=True,
        ),
        Claim(
            name="power step",
            text="One power step moves the prediction more than the random start, in 95 % of texts.",
            rules=(
                Rule(measure="power_share", comparison="above", threshold=0.95),
                over("power_kl", "start_kl"),
            ),
        ),
        Claim(
            name="what they hold",
            text="Unlabelled texts with cues do more than as many without (the placebo).",
            rules=(under("cues_unlabelled_loss", "cues_plain_loss"),),
        ),
        Claim(
            name="any source",
            text="Texts without cues do not cost accuracy against VAT on the labelled alone.",
            rules=(over("cues_plain_accuracy", "cues_vat_accuracy", -0.03),),
            paper="gains survive when the data come from another source",
        ),
        Claim(
            name="better prediction",
            text="It predicts better than plain training.",
            rules=(over("cues_unlabelled_accuracy", "cues_none_accuracy"),),
            paper="better than plain and than AT and VAT on embeddings",
        ),
        Claim(
            name="evidence",
            text="More attention lies on the cue words than in plain training.",
            rules=(over("cues_unlabelled_mass", "cues_none_mass"),),
            paper="stronger agreement with human evidence",
        ),
        Claim(
            name="readable",
            text="Attention correlates more with gradient importance than in plain training.",
            rules=(over("cues_unlabelled_correlation", "cues_none_correlation"),),
        ),
    )
    full = Size()
    quick = Size(seeds=1, labelled=32, unlabelled=40, epochs=1, held_out=20)

    def steps(self) -> Iterable[Step]:
        for seed in range(self.size.seeds):
            for name in CONDITIONS:
                cost = 2.0 if name in ("random_vat", "unlabelled", "plain") else 1.0
                yield Step(f"{name}, seed {seed}", partial(self.run, name, seed), cost=cost)

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """Train and attack one classifier."""
        from regard.studies.adversarial_attention_parts import trained_and_judged
        from regard.tasks.cue_words import cue_sentences

        size, seed = self.size, 1000 * self.seed + seed
        data = cue_sentences(
            size.labelled, size.held_out, unlabelled=size.unlabelled, plain=size.unlabelled, seed=seed
        )
        pools = {"random_vat": data.unlabelled, "unlabelled": data.unlabelled, "plain": data.plain}
        kind = "vat" if name in ("unlabelled", "plain") else name
        return trained_and_judged(
            data, kind, epochs=size.epochs, eps=EPS, seed=seed, tick=self.tick,
            unlabelled=pools.get(name, ()),
        )  # fmt: skip

    def measure(self, results: Results) -> Mapping[str, Sequence[float]]:
        found: dict[str, list[float]] = {}
        for name in CONDITIONS:
            runs = of_condition(results, name)
            found |= {
                f"cues_{name}_{kind}": [run[kind] for run in runs]
                for kind in ("accuracy", "mass", "correlation")
            }
            found[f"cues_{name}_attacked"] = [run["attacked"]["5"] for run in runs]
            found[f"cues_{name}_loss"] = [run["loss"]["1"] for run in runs]
        plain = of_condition(results, "none")
        for name in ("power_share", "power_kl", "start_kl"):
            found[name] = [run["directions"][name] for run in plain]
        return found

    def details(self, results: Results) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in CONDITIONS:
            runs = of_condition(results, name)
            curves = {
                key: {eps: sum(run[key][eps] for run in runs) / len(runs) for eps in runs[0][key]}
                for key in ("attacked", "random", "loss")
            }
            means = {key: sum(run[key] for run in runs) / len(runs) for key in ("entropy", "auprc", "iou_f1")}
            found[name] = {**curves, **means}
        return {"cues": found}

    def draw(self, outcome: Outcome, figure: Figure) -> None:
        from regard.studies.adversarial_attention_picture import draw

        draw(outcome, figure, "cues", list(CONDITIONS), evidence=True)


def of_condition(results: Results, name: str) -> list[dict[str, Any]]:
    """Return the runs of a condition, a seed each."""
    return [run for step, run in results.items() if step.startswith(f"{name}, ")]
