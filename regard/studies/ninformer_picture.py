"""The picture of the study of NiNformer: accuracies, and the cost of a step by tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regard.studies.picture import COLOURS, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

LABELS = {
    "nin": ("NiNformer", "blue"), "mixer": ("Mixer", "orange"), "vit": ("ViT", "green"),
    "add": ("u + v", "sky"), "apart": ("two\nnorms", "pink"), "one": ("gate 1", "grey"),
}  # fmt: skip
KINDS = {"": "All labels", "_few": "A tenth of the labels", "_moved": "Moved by two pixels"}


def draw(outcome: Outcome, figure: Figure) -> None:
    """Draw the outcome."""
    (first, second), (third, cost) = figure.subplots(2, 2)
    for axes, (end, title) in zip((first, second, third), KINDS.items(), strict=True):
        _accuracies(axes, outcome, end, title)
    _cost(cost, outcome)


def _accuracies(axes: Axes, outcome: Outcome, end: str, title: str) -> None:
    lowest = 1.0
    for place, (name, (_, colour)) in enumerate(LABELS.items()):
        values = outcome.measures[name + end]["values"]
        lowest = min(lowest, *values)
        axes.bar(place, outcome.value(name + end), color=COLOURS[colour], alpha=0.5, width=0.7)
        axes.plot([place] * len(values), values, "o", color=COLOURS[colour], markersize=4)
    axes.set_xticks(range(len(LABELS)), [label for label, _ in LABELS.values()], fontsize=8)
    percent(axes, 1.02)
    cut = lowest > 0.4
    axes.set_ylim(lowest - 0.1 if cut else 0.0, 1.01)
    axes.set_title(f"{title} (cut axis)" if cut else title)


def _cost(axes: Axes, outcome: Outcome) -> None:
    tokens = outcome.details["tokens"]
    for kind, label, colour in (("gating", "NiNformer block", "blue"), ("attention", "ViT block", "green")):
        times = [outcome.value(f"{kind}_{n}") for n in tokens]
        axes.plot(tokens, times, "o-", color=COLOURS[colour], label=label)
    axes.axvline(640, color=COLOURS["grey"], linestyle=":", linewidth=1, label="equal by multiply-adds")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(tokens, [str(n) for n in tokens])
    axes.set_xlabel("tokens, d 256, h 512")
    axes.set_ylabel("ms a step, one thread")
    axes.set_title("Forward and backward of one block")
    axes.legend(fontsize=9)
