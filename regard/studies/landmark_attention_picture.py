"""The picture of the study of landmark attention: answers by number of blocks, and losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regard.studies.picture import COLOURS, intervals, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

BLOCKS = (8, 32, 64)
NAMES = {
    "full": ("all blocks", "grey", ":"),
    "top2": ("two, by landmark", "blue", "-"),
    "top1": ("one, by landmark", "sky", "-"),
    "mean": ("two, by mean key", "green", "--"),
    "recent": ("the last two", "orange", "--"),
    "random": ("any two", "pink", "--"),
}
PLACES = {"anew": ("new positions", "blue", "-"), "stood": ("where they stood", "orange", "--")}
TEXTS = {
    "long_landmark": "4 blocks,\nby landmark", "long_recent": "the last 4", "long_random": "any 4",
    "long_none": "none", "long_window": "softmax,\nwindow", "long_plain": "softmax,\nall",
}  # fmt: skip
TUNED = {"untuned": "landmarks,\nuntrained", "tuned": "12 steps\nlater", "smollm": "SmolLM2"}


def draw(outcome: Outcome, figure: Figure) -> None:
    """Draw answers by way of reading, by positions, and the losses of language models."""
    axes = figure.subplots(2, 2)
    _lines(outcome, axes[0][0], NAMES, "no positions: which blocks are read")
    _lines(outcome, axes[0][1], PLACES, "rotary: where the two blocks are read at")
    _bars(outcome, axes[1][0], TEXTS, "small models, trained at 248 tokens, at 248 to 1,984")
    _bars(outcome, axes[1][1], TUNED, "SmolLM2, 252 tokens")


def _lines(outcome: Outcome, axis: Axes, names: dict[str, tuple[str, str, str]], title: str) -> None:
    for name, (label, colour, style) in names.items():
        means, spread = intervals(outcome, [f"{name}_{n}" for n in BLOCKS])
        axis.errorbar(
            range(len(BLOCKS)), means, spread, linestyle=style, marker="o", color=COLOURS[colour],
            label=label, capsize=2,
        )  # fmt: skip
    percent(axis, 1.05)
    axis.set_xticks(range(len(BLOCKS)), [f"{n} blocks" for n in BLOCKS])
    axis.set_ylabel("right answers")
    axis.set_title(f"{title}; trained at 8")
    axis.legend()


def _bars(outcome: Outcome, axis: Axes, names: dict[str, str], title: str) -> None:
    means, spread = intervals(outcome, list(names))
    colours = [COLOURS["blue" if i == 0 or name == "tuned" else "grey"] for i, name in enumerate(names)]
    axis.bar(range(len(names)), means, yerr=spread, color=colours, capsize=3)
    axis.set_xticks(range(len(names)), names.values())
    axis.set_ylim(0.9 * min(means), 1.05 * max(means))
    axis.set_ylabel("loss, nats (not from 0)")
    axis.set_title(title)
