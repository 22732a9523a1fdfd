"""The picture of `flowformer`: losses on the needle task, recall with narrow heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regard.studies.picture import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

NAMES = {
    "flow": ("Flow-Attention", "blue", "-"),
    "no_allocation": ("without allocation", "sky", "-"),
    "clamped": ("clamped to 1", "pink", "--"),
    "no_competition": ("without competition", "orange", "--"),
    "linear": ("linear attention", "green", "-"),
    "softmax": ("softmax", "grey", ":"),
}
PIECE = 20


def draw(outcome: Outcome, figure: Figure) -> None:
    """Draw the losses of the needle task and the accuracies of recall."""
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for name, (label, colour, style) in NAMES.items():
        for number, curve in enumerate(outcome.details["curves"].get(name, [])):
            steps = [PIECE * (i + 1) for i in range(len(curve))]
            left.plot(
                steps, curve, style, color=COLOURS[colour], linewidth=1.2,
                label=label if number == 0 else None,
            )  # fmt: skip
    left.axhline(0.5, color=COLOURS["grey"], linewidth=0.8)
    left.set_xlabel("steps")
    left.set_ylabel("training loss, nats")
    left.set_title("one marker among 256 tokens, a line a seed", fontsize=10)
    left.legend(fontsize=8, frameon=False)
    recall = ("flow", "linear", "softmax")
    for place, name in enumerate(recall):
        values = outcome.measures[f"recall_{name}"]["values"]
        right.plot(
            [place] * len(values), [100 * x for x in values], "o", color=COLOURS[NAMES[name][1]], alpha=0.7
        )
    right.axhline(100 * outcome.details["chance"], color=COLOURS["grey"], linewidth=0.8, linestyle=":")
    right.set_xticks(range(len(recall)), [NAMES[name][0] for name in recall], fontsize=8)
    right.set_xlim(-0.5, len(recall) - 0.5)
    right.set_ylim(0, 102)
    right.set_ylabel("recalled, %")
    right.set_title("recall, heads of width 4 (dotted: a guess)", fontsize=10)
