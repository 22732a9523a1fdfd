"""The picture of `visual-attention-network`: cost by pixels, and accuracy on pairs and on textures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regard.studies.picture import COLOURS, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

WAYS = {"gated": ("large kernels", "blue"), "dense": ("softmax over all", "grey")}
PAIRS = {
    "product_14": ("product,\n14 apart", "blue"), "sum_14": ("sum,\n14 apart", "sky"),
    "near_14": ("5 x 5,\n14 apart", "orange"), "product_4": ("product,\n4 apart", "blue"),
    "near_4": ("5 x 5,\n4 apart", "orange"), "none_4": ("no gate,\n4 apart", "grey"),
}  # fmt: skip
TEXTURES = {
    "textures_product": ("large kernel,\nproduct", "blue"), "textures_sum": ("large kernel,\nsum", "sky"),
    "textures_plain": ("dense\n9 x 9", "orange"), "textures_blind": ("no\nneighbours", "grey"),
}  # fmt: skip


def draw(outcome: Outcome, figure: Figure) -> None:
    """Draw the outcome."""
    grid = figure.add_gridspec(2, 2)
    _time(figure.add_subplot(grid[0, 0]), outcome)
    textures = figure.add_subplot(grid[0, 1])
    _bars(textures, outcome, TEXTURES)
    textures.axhline(1 / 8, color=COLOURS["grey"], linestyle=":", linewidth=1)
    textures.set_title("Textures of eight kinds, equal parameters (dotted: a guess)")
    pairs = figure.add_subplot(grid[1, :])
    _bars(pairs, outcome, PAIRS)
    pairs.axhline(0.5, color=COLOURS["grey"], linestyle=":", linewidth=1)
    pairs.set_title("Two pixels: side by side, or one above the other? (dotted: a guess)")


def _time(axes: Axes, outcome: Outcome) -> None:
    told = outcome.details["milliseconds"]
    for way, (label, colour) in WAYS.items():
        found = {int(name.split()[1]): ms for name, ms in told.items() if name.startswith(f"{way} ")}
        power = outcome.value("growth" if way == "gated" else "growth_dense")
        axes.plot(
            [side**2 for side in found], list(found.values()), "o-", color=COLOURS[colour],
            label=f"{label}: pixels to the power {power:.2f}",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("pixels of a map of 16 channels")
    axes.set_ylabel("ms, one thread")
    axes.set_title("Time")
    axes.legend(fontsize=9)


def _bars(axes: Axes, outcome: Outcome, arms: dict[str, tuple[str, str]]) -> None:
    for at, (name, (_, colour)) in enumerate(arms.items()):
        values = outcome.measures[name]["values"]
        axes.bar(at, outcome.value(name), color=COLOURS[colour], alpha=0.5, width=0.7)
        axes.plot([at] * len(values), values, "o", color=COLOURS[colour], markersize=4)
    axes.set_xticks(range(len(arms)), [label for label, _ in arms.values()], fontsize=9)
    percent(axes, 1.02)
    axes.set_ylabel("labelled rightly")
