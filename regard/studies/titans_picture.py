"""The picture of `titans`: errors of untrained memories by rule and by chunk, recall of trained models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regard.studies.picture import COLOURS, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

PAIRS = {
    "new": "newest 4\nof 64", "all": "all 64", "few_new": "newest 4\nof 16", "few_all": "all 16",
}  # fmt: skip
MODELS = {
    "mag": ("memory\nas gate", "blue"), "mag_silenced": ("silenced\nafterwards", "sky"),
    "mag_blind": ("never any\nmemory", "grey"), "mac": ("memory as\ncontext", "blue"),
    "mac_silenced": ("silenced\nafterwards", "sky"), "mac_blind": ("never any\nmemory", "grey"),
}  # fmt: skip


def draw(outcome: Outcome, figure: Figure) -> None:
    """Draw the outcome."""
    grid = figure.add_gridspec(2, 2)
    _rules(figure.add_subplot(grid[0, 0]), outcome)
    _chunks(figure.add_subplot(grid[0, 1]), outcome)
    _models(figure.add_subplot(grid[1, :]), outcome)


def _rules(axes: Axes, outcome: Outcome) -> None:
    for shift, ending, colour, label in (
        (-0.2, "", "blue", "gradient memory"),
        (0.2, "_sum", "orange", "linear attention"),
    ):
        heights = [outcome.value(name + ending) for name in PAIRS]
        places = [place + shift for place in range(len(PAIRS))]
        axes.bar(places, heights, width=0.38, color=COLOURS[colour], label=label)
    axes.set_xticks(range(len(PAIRS)), list(PAIRS.values()))
    axes.set_ylabel("relative squared error")
    axes.legend(loc="upper right")
    axes.set_title("Untrained, one matrix of 32 x 32: which pairs are kept")


def _chunks(axes: Axes, outcome: Outcome) -> None:
    chunks = outcome.details["chunks"]
    names = ["new" if b == 1 else f"new_{b}" for b in chunks]
    for name, b in zip(names, chunks, strict=True):
        values = outcome.measures[name]["values"]
        axes.plot([b] * len(values), values, "o", color=COLOURS["grey"], markersize=3, alpha=0.5)
    axes.plot(chunks, [outcome.value(name) for name in names], "o-", color=COLOURS["blue"])
    axes.set_xscale("log", base=2)
    axes.set_xticks(chunks, [str(b) for b in chunks])
    axes.set_xlabel("positions in a chunk")
    axes.set_ylabel("relative squared error, newest 4 of 64")
    axes.set_title("What chunks cost at the same step (a dot a draw)")


def _models(axes: Axes, outcome: Outcome) -> None:
    for place, (name, (_, colour)) in enumerate(MODELS.items()):
        values = outcome.measures[name]["values"]
        axes.bar(place, outcome.value(name), color=COLOURS[colour], alpha=0.5, width=0.7)
        axes.plot([place] * len(values), values, "o", color=COLOURS[colour], markersize=4)
    for height, style in ((outcome.details["chance"], ":"), (outcome.details["among_shown"], "--")):
        axes.axhline(height, color=COLOURS["grey"], linestyle=style, linewidth=1)
    axes.set_xticks(range(len(MODELS)), [label for label, _ in MODELS.values()])
    percent(axes, 1.02)
    axes.set_title(
        "Recall at four windows, a dot a seed (dotted: a guess, dashed: a guess among the values shown)"
    )
