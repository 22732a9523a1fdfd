"""The part of the picture of `attention-sink-emergence` that shows trainings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from regard.studies.picture import COLOURS, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

LINES = {
    "softmax": ("softmax", "blue", "-"),
    "value": ("softmax, learned value", "sky", "-"),
    "key": ("softmax, learned key", "orange", "-"),
    "sigmoid": ("sigmoid, not normalised (proxy)", "pink", "-"),
    "no_front": ("softmax, any token first", "grey", "--"),
    "novels": ("softmax, on novels", "grey", ":"),
}


def draw_trainings(figure: SubFigure, runs: Mapping[str, Sequence[Any]]) -> None:
    """Draw how the sink emerges, and the loss meanwhile, mean over seeds."""
    sink, loss = figure.subplots(1, 2)
    _lines(sink, runs, "sink", list(LINES))
    sink.set(title="Training: when does a sink emerge?", xlabel="steps", ylabel="heads with a sink")
    sink.legend(fontsize=8, frameon=False, loc="upper right", bbox_to_anchor=(1.62, 1.0))
    percent(sink, 1.01)
    _lines(loss, runs, "loss", [name for name in LINES if name != "novels"])
    loss.set(title="And the loss?", xlabel="steps", ylabel="nats, held out")


def _lines(axis: Axes, runs: Mapping[str, Sequence[Any]], what: str, names: Sequence[str]) -> None:
    for name in names:
        label, colour, style = LINES[name]
        curves = np.asarray([run[what] for run in runs[name]], dtype=float)
        steps = runs[name][0]["steps"]
        axis.plot(steps, curves.mean(0), style, color=COLOURS[colour], label=label)
        axis.fill_between(steps, curves.min(0), curves.max(0), color=COLOURS[colour], alpha=0.15, linewidth=0)
