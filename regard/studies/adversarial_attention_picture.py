"""Accuracy against the length of the attack, and how attention agrees with gradients; two studies draw it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

COLOURS = ("#444444", "#9aa0a6", "#c0392b", "#e67e22", "#2471a3", "#27ae60", "#8e44ad")


def draw(outcome: Outcome, figure: Figure, task: str, names: Sequence[str], evidence: bool = False) -> None:
    """Draw curves of accuracy at the left, and what attention is like at the right, seeds as dots."""
    figure.set_size_inches(10.5, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    told = outcome.details[task]
    for name, colour in zip(names, COLOURS, strict=False):
        curve = told[name]["attacked"]
        left.plot(
            [float(eps) for eps in curve], list(curve.values()), "o-", color=colour, label=_said(name), ms=4
        )
    left.set(xlabel="length of the attack, in units of scores", ylabel="held-out accuracy", ylim=(0, 1))
    left.axhline(0.5, color="#cccccc", lw=1, zorder=0)
    left.legend(frameon=False, fontsize=8, ncols=2, loc="lower left")
    left.set_title("worst perturbation found, mean over seeds", loc="left", fontsize=10)
    kinds = ("correlation", "mass") if evidence else ("correlation",)
    for row, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        for kind, mark in zip(kinds, "o^", strict=False):
            values = outcome.measures[f"{task}_{name}_{kind}"]["values"]
            right.plot(values, [row] * len(values), mark, color=colour, alpha=0.5, ms=5)
            right.plot(sum(values) / len(values), row, "|", color=colour, ms=18, mew=2)
    right.set_yticks(range(len(names)), [_said(name) for name in names])
    right.invert_yaxis()
    right.set_xlabel("dots: correlation" + ("; triangles: on cue words" if evidence else ""))
    right.set_title("attention and gradient importance", loc="left", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)


def _said(name: str) -> str:
    return {"at": "AT", "published": "published (negated)", "vat": "VAT, labelled alone",
            "unlabelled": "VAT + unlabelled", "plain": "VAT + texts without cues",
            "random_vat": "random + unlabelled"}.get(name, name)  # fmt: skip
