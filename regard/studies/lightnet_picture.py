"""The picture of `lightnet`: who sees the mark, what positions add, and the decay."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from regard.studies.picture import COLOURS, intervals, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

SCANS = {
    "lightnet": "LightNet,\none\nscan", "one_scan": "fixed\ndecay,\none scan",
    "two_scans": "fixed\ndecay,\ntwo scans", "softmax": "softmax",
}  # fmt: skip
POSITIONS = {"none": "no positions", "tpe": "MD-TPE", "lrpe": "MD-LRPE", "both": "both"}
GUESS = 1 / 8


def draw(outcome: Outcome, figure: Figure) -> None:
    """Draw three panels: the marked pixel, the pixel above, the decay."""
    marker, above, decay = figure.subplots(1, 3)
    _marker(marker, outcome)
    _above(above, outcome)
    _decay(decay, outcome)
    size = outcome.size
    figure.suptitle(
        f"LightNet on 8 × 8 images: {size['seeds']} seeds, {size['steps']} steps"
        f"{', quick run' if outcome.quick else ''}. Lines on bars are 95 % intervals.",
        fontsize=10.5,
    )


def _marker(axis: Axes, outcome: Outcome) -> None:
    places = np.arange(len(SCANS))
    for part, shift, colour in (("before", -0.2, "blue"), ("after", 0.2, "sky")):
        means, reach = intervals(outcome, [f"{name}_{part}" for name in SCANS])
        label = "before the mark" if part == "before" else "from the mark on"
        axis.bar(places + shift, means, 0.38, yerr=reach, color=COLOURS[colour], label=label)
    axis.set_xticks(places, list(SCANS.values()), fontsize=9)
    _finish(axis, "Which pixels know the marked one's colour?")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, fontsize=9)


def _above(axis: Axes, outcome: Outcome) -> None:
    means, reach = intervals(outcome, [f"above_{name}" for name in POSITIONS])
    colours = [COLOURS["grey"], COLOURS["blue"], COLOURS["orange"], COLOURS["green"]]
    axis.bar(range(len(POSITIONS)), means, 0.6, yerr=reach, color=colours)
    axis.set_xticks(range(len(POSITIONS)), list(POSITIONS.values()), fontsize=9)
    _finish(axis, "Which pixels know the colour above?")


def _finish(axis: Axes, title: str) -> None:
    axis.axhline(GUESS, color=COLOURS["grey"], linestyle="--", linewidth=1, zorder=0)
    axis.annotate("a guess", (1, GUESS), (0, 3), xycoords=("axes fraction", "data"), ha="right",
                  textcoords="offset points", fontsize=9, color=COLOURS["grey"])  # fmt: skip
    percent(axis, 1.05)
    axis.set_xlim(-0.6, 4.3)
    axis.set(title=title, ylabel="pixels labelled rightly")


def _decay(axis: Axes, outcome: Outcome) -> None:
    steps = np.arange(1, 1001)
    axis.plot(steps, steps / (steps + 1), "--", color=COLOURS["grey"], label="t / (t + 1)")
    at = [1, 10, 100, 1000]
    means, _ = intervals(outcome, [f"decay_{t}" for t in at])
    axis.plot(at, means, "o", color=COLOURS["orange"], label="normal keys")
    for number, curve in enumerate(outcome.details["decays"]):
        label = "trained, one line a seed" if number == 0 else None
        axis.plot(np.arange(1, len(curve) + 1), curve, color=COLOURS["blue"], linewidth=1.2, label=label)
    axis.set_xscale("log")
    axis.set(title="How much of the state is kept?", xlabel="step t", ylim=(0, 1.03))
    axis.set_ylabel("mean decay $e^{z_{t-1} - z_t}$")
    axis.legend(loc="lower right", fontsize=9)
