"""The picture of `routing-transformer`: mass kept, recall by arm, and language loss by arm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regard.studies.picture import COLOURS, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

MASS = {"mass_learned": ("k-means", "blue"), "mass_fixed": ("random\ncentroids", "sky"),
        "mass_random": ("random\nkeys", "grey")}  # fmt: skip
RECALL = {
    "dense": ("dense", "grey"), "window": ("window", "grey"), "random": ("clusters\nby chance", "grey"),
    "fixed": ("fixed\ncentroids", "sky"), "routing": ("k-means", "blue"),
    "causal_fixed": ("causal,\nfixed", "sky"), "causal": ("causal,\nk-means", "blue"),
}  # fmt: skip
TEXT = {
    "text_full": ("full", "grey"), "text_local": ("near\nblocks", "grey"),
    "text_random": ("routed\nby chance", "grey"),
    "text_routing": ("k-means", "blue"),
}  # fmt: skip


def draw(outcome: Outcome, figure: Figure) -> None:
    """Draw the outcome."""
    grid = figure.add_gridspec(2, 2)
    mass, text = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    recall = figure.add_subplot(grid[1, :])
    _bars(mass, outcome, MASS)
    percent(mass, 1.02)
    mass.set_title("Dense attention kept, planted clusters")
    _bars(recall, outcome, RECALL)
    recall.axhline(outcome.details["chance"], color=COLOURS["grey"], linestyle=":", linewidth=1)
    percent(recall, 1.02)
    recall.set_title("Recall among 256 tokens after training, a dot a seed (dotted: a guess)")
    _bars(text, outcome, TEXT)
    values = [value for name in TEXT for value in outcome.measures[name]["values"]]
    edge = max(0.02, (max(values) - min(values)) / 2)
    text.set_ylim(min(values) - edge, max(values) + edge)
    text.set_ylabel("nats a token, held out")
    text.set_title("Language, two novels")


def _bars(axes: Axes, outcome: Outcome, bars: dict[str, tuple[str, str]]) -> None:
    for place, (name, (_, colour)) in enumerate(bars.items()):
        values = outcome.measures[name]["values"]
        axes.bar(place, outcome.value(name), color=COLOURS[colour], alpha=0.5, width=0.7)
        axes.plot([place] * len(values), values, "o", color=COLOURS[colour], markersize=4)
    axes.set_xticks(range(len(bars)), [label for label, _ in bars.values()])
