"""The picture of `active-dormant-heads`: heads on prose and code, the residual stream, the small models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from regard.studies.picture import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

NAMES = {
    "softmax": ("softmax, 1 layer", "blue"), "relu": ("ReLU, 1 layer", "orange"),
    "deep": ("3 layers, AdamW", "green"), "sgd": ("3 layers, SGD", "pink"),
}  # fmt: skip


def draw(outcome: Outcome, figure: Figure) -> None:
    """Draw the outcome."""
    (one, two, three), (four, five, six) = figure.subplots(2, 3)
    _domains(one, outcome)
    _norms(two, outcome)
    _forced(three, outcome)
    _course(four, outcome, "sink", "Weight on <s> where nothing is copied", log=False)
    _course(five, outcome, "peak", "Residual norm of <s> / largest other", log=True)
    _course(six, outcome, "drain", "Value of <s> / the others'", log=True)


def _domains(axes: Axes, outcome: Outcome) -> None:
    prose, code = (np.mean(outcome.details["first"][domain], 0) for domain in ("prose", "code"))
    axes.plot([0, 1], [0, 1], ":", color=COLOURS["grey"], linewidth=1)
    axes.plot(prose, code, "o", color=COLOURS["blue"], markersize=3, alpha=0.6)
    axes.set_xlabel("on prose")
    axes.set_ylabel("on Python")
    axes.set_title("Weight on the first token, a dot a head")


def _norms(axes: Axes, outcome: Outcome) -> None:
    told = outcome.details["norms"]
    axes.plot(told["first"], color=COLOURS["blue"], label="first token")
    axes.plot(told["largest_other"], color=COLOURS["grey"], label="largest other")
    axes.set_yscale("log")
    axes.set_xlabel("after block")
    axes.set_title("Norm of the residual stream, one passage")
    axes.legend()


def _forced(axes: Axes, outcome: Outcome) -> None:
    for place, name in enumerate(("active", "dormant", "random")):
        values = outcome.measures[name]["values"]
        colour = COLOURS["grey" if name == "random" else "blue"]
        axes.bar(place, float(np.mean(values)), 0.6, color=colour, alpha=0.4)
        axes.plot([place] * len(values), values, "o", color=colour, markersize=3)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_xticks(range(3), ["at work\nthere", "dormant\nthere", "random"])
    axes.set_ylabel("nats")
    axes.set_title("Loss gained by forcing heads onto the first token")


def _course(axes: Axes, outcome: Outcome, measure: str, title: str, log: bool) -> None:
    for name, (label, colour) in NAMES.items():
        runs = [run for step, run in outcome.details["toys"].items() if step.startswith(f"{name},")]
        for number, run in enumerate(runs):
            pick = min if measure == "drain" else max
            line = [
                pick(v for k, v in told.items() if k.startswith(f"{measure}.")) for told in run["measures"]
            ]
            shown = label if not number else None
            axes.plot(run["steps"], line, color=COLOURS[colour], linewidth=1.3, label=shown)
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1)
        axes.legend(fontsize=8)
    axes.set_xlabel("step")
    axes.set_title(title)
