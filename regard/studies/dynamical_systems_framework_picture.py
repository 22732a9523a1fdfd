"""The picture of `dynamical-systems-framework`: errors of the rows and of the faults, recall by mixer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regard.studies.picture import COLOURS, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

FLOOR = 1e-17
LABELS = {
    "softmax": "softmax\nn = 16", "linear_4": "linear\nn = 4", "linear_8": "linear\nn = 8",
    "linear_16": "linear\nn = 16", "normalised_16": "normal-\nised\nn = 16", "blind": "itself\nalone",
}  # fmt: skip


def draw(outcome: Outcome, figure: Figure) -> None:
    """Draw the outcome."""
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    _errors(left, outcome)
    _recall(right, outcome)


def _errors(axes: Axes, outcome: Outcome) -> None:
    told = outcome.details
    entries = [*((n, e, "blue") for n, e in told["rows"].items())]
    entries += [(n, e, "orange") for n, e in told["faults"].items()]
    for place, (_, error, colour) in enumerate(reversed(entries)):
        axes.plot([FLOOR, max(error, FLOOR)], [place, place], color=COLOURS[colour], linewidth=1)
        axes.plot([max(error, FLOOR)], [place], "o", color=COLOURS[colour], markersize=5)
    axes.axvline(1e-12, color=COLOURS["grey"], linestyle=":", linewidth=1)
    axes.set_yticks(range(len(entries)), [name for name, _, _ in reversed(entries)], fontsize=9)
    axes.set_xscale("log")
    axes.set_xlim(FLOOR, 100)
    axes.set_xlabel("largest difference from the mixer's own formula")
    axes.set_title("Systems (blue), and with a planted fault (orange)")


def _recall(axes: Axes, outcome: Outcome) -> None:
    for place, name in enumerate(LABELS):
        values = outcome.measures[name]["values"]
        colour = COLOURS["grey" if name == "blind" else "pink" if name == "softmax" else "blue"]
        axes.bar(place, outcome.value(name), color=colour, alpha=0.5, width=0.7)
        axes.plot([place] * len(values), values, "o", color=colour, markersize=4)
    axes.axhline(outcome.details["chance"], color=COLOURS["grey"], linestyle=":", linewidth=1)
    axes.set_xticks(range(len(LABELS)), list(LABELS.values()), fontsize=9)
    percent(axes, 1.02)
    axes.set_title("Recall accuracy, a dot a seed (dotted: a guess)")
