"""The picture of `sae-circuits`: planted circuits, the model's three, curves, and heads of one layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regard.studies.picture import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

TASKS = {"ioi": "indirect objects", "greater_than": "later years", "docstring": "docstrings"}
PLANTED = {"sae": ("codes", "blue"), "diff": ("difference of means", "orange"),
           "shuffled": ("codes, labels shuffled", "grey")}  # fmt: skip
WAYS = {
    "sae": ("codes", "blue"), "edges": ("pairs of codes", "sky"), "diff": ("difference of means", "orange"),
    "layer": ("number of the layer", "yellow"), "shuffled": ("codes, labels shuffled", "grey"),
}  # fmt: skip
WITHIN = {"within": ("codes", "blue"), "within_diff": ("difference of means", "orange"),
          "within_shuffled": ("codes, labels shuffled", "grey")}  # fmt: skip
CURVES = {"sae": ("codes", "blue"), "mean_diff": ("difference of means", "orange"),
          "layer": ("number of the layer", "yellow")}  # fmt: skip


def draw(outcome: Outcome, figure: Figure) -> None:
    """Draw the outcome."""
    (planted, model), (curves, within) = figure.subplots(2, 2)
    kinds = {"means": "class means differ", "signs": "class means are equal"}
    _groups(planted, outcome, kinds, PLANTED, "Planted circuits: AUC over heads")
    _groups(model, outcome, TASKS, WAYS, "SmolLM2 against path patching: AUC over heads")
    _curves(curves, outcome)
    _groups(within, outcome, TASKS, WITHIN, "The same, over pairs of heads of one layer")


def _groups(
    axes: Axes, outcome: Outcome, groups: dict[str, str], ways: dict[str, tuple[str, str]], title: str
) -> None:
    for number, (way, (label, colour)) in enumerate(ways.items()):
        for group, name in enumerate(groups):
            at = group * (len(ways) + 1.2) + number
            values = outcome.measures[f"{name}_{way}"]["values"]
            axes.plot([at] * len(values), values, "o", color=COLOURS[colour], markersize=4, alpha=0.6)
            axes.plot(
                [at - 0.35, at + 0.35], [outcome.value(f"{name}_{way}")] * 2, color=COLOURS[colour],
                label=label if not group else None,
            )  # fmt: skip
    axes.axhline(0.5, color=COLOURS["grey"], linestyle=":", linewidth=1)
    middle = (len(ways) - 1) / 2
    axes.set_xticks(
        [group * (len(ways) + 1.2) + middle for group in range(len(groups))], list(groups.values())
    )
    axes.set_ylim(0, 1.03)
    axes.set_title(title)
    axes.legend(fontsize=8, loc="lower right")


def _curves(axes: Axes, outcome: Outcome) -> None:
    for name, (label, colour) in CURVES.items():
        points = outcome.details["ioi"]["roc"][name]
        axes.plot([x for x, _ in points], [y for _, y in points], color=COLOURS[colour], label=label)
    axes.plot([0, 1], [0, 1], color=COLOURS["grey"], linestyle=":", linewidth=1)
    axes.set(xlabel="other heads above the threshold", ylabel="heads of the circuit above it")
    axes.set_title("Indirect objects, first prompt set")
    axes.legend(fontsize=8, loc="lower right")
