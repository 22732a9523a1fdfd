"""The picture of the study of HiP: keys found, dense attention kept, and the loss, by way to choose."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regard.studies.picture import COLOURS, intervals, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

NAMES = {
    "dense": "dense", "tree": "HiP", "refresh": "HiP, a search\nfor 8 tokens", "oracle": "oracle",
    "random": "random\ntree", "window": "window,\nfirst tokens",
}  # fmt: skip
LINES = {
    "oracle": ("oracle", "green", "--"),
    "tree": ("HiP", "blue", "-"),
    "window": ("window and first tokens", "orange", "--"),
    "random": ("random tree", "pink", "--"),
}


def draw(outcome: Outcome, figure: Figure) -> None:
    """Draw log-probabilities of keys at two lengths, kept attention by layer, and losses."""
    axes = figure.subplots(2, 2)
    size = outcome.details
    _bars(outcome, axes[0][0], "key", "the key in 1,000 tokens, 208 of them read")
    _bars(outcome, axes[0][1], "long", "the key in 2,000 tokens, 336 of them read")
    for axis in axes[0]:
        axis.set_ylabel("log-probability, nats a token")
    _lines(size["kept_by_layer"], size["first_layer"], axes[1][0])
    _bars(outcome, axes[1][1], "loss", "later half of the novel, 1,000 tokens")
    axes[1][1].set_ylabel("loss, nats (not from 0)")
    values = [outcome.value(f"loss_{way}") for way in NAMES if f"loss_{way}" in outcome.measures]
    axes[1][1].set_ylim(0.9 * min(values), 1.05 * max(values))


def _bars(outcome: Outcome, axis: Axes, what: str, title: str) -> None:
    ways = [way for way in NAMES if f"{what}_{way}" in outcome.measures]
    means, spread = intervals(outcome, [f"{what}_{way}" for way in ways])
    colours = [COLOURS["blue" if way == "tree" else "grey"] for way in ways]
    axis.bar(range(len(ways)), means, yerr=spread, color=colours, capsize=3)
    axis.set_xticks(range(len(ways)), [NAMES[way] for way in ways])
    axis.set_title(title)


def _lines(kept: dict[str, list[float]], first: int, axis: Axes) -> None:
    for way, (label, colour, style) in LINES.items():
        layers = [first + 3 * i for i in range(len(kept[way]))]
        axis.plot(layers, kept[way], linestyle=style, marker="o", color=COLOURS[colour], label=label)
    percent(axis, 1.02)
    axis.set_xlabel("layer")
    axis.set_ylabel("dense attention kept")
    axis.set_title("of the last 256 queries in 1,000 tokens")
    axis.legend(loc="lower right")
