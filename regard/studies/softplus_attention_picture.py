"""The picture of the study `softplus-attention`: loss by length, a line a seed; and the swap."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regard.studies.picture import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

LENGTHS = (64, 128, 256, 512)
NAMES = {
    "softmax": ("softmax", "grey", "-"),
    "scaled_softmax": ("softmax, same norm and scale", "black", "--"),
    "lssa": ("LSSA", "orange", "-"),
    "lssar_3": ("LSSAR, p = 3", "pink", "-"),
    "lssar_15": ("LSSAR, p = 15", "blue", "-"),
}
SWAPPED = {"plain": "as it is", "swapped": "LSSA\nswapped in", "reweighted": "LSSAR\nswapped in"}


def draw(outcome: Outcome, figure: Figure) -> None:
    """Draw the outcome."""
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for name, (label, colour, style) in NAMES.items():
        shade = COLOURS.get(colour, "#111111")
        for number, curve in enumerate(outcome.details["curves"][name]):
            left.plot(LENGTHS, curve, style, marker="o", markersize=3, color=shade, linewidth=1.2,
                      label=label if number == 0 else None)  # fmt: skip
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
    left.set_xlabel("tokens (trained at 64)")
    left.set_ylabel("loss on what repeats, nats")
    left.set_title("Induction beyond the length trained at, a line a seed", fontsize=10)
    left.legend(fontsize=8, frameon=False)
    for place, name in enumerate(SWAPPED):
        values = outcome.measures[name]["values"]
        colour = COLOURS["grey" if name == "plain" else "blue"]
        right.bar(place, outcome.value(name), color=colour, alpha=0.5, width=0.7)
        right.plot([place] * len(values), values, "o", color=colour, markersize=4)
    right.set_xticks(range(len(SWAPPED)), list(SWAPPED.values()), fontsize=9)
    right.set_ylabel("loss, nats")
    right.set_title("SmolLM2-135M without training, a dot a text", fontsize=10)
