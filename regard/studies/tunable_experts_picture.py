"""The picture of the study of tunable experts: refusals by experts off, and where the leading ones are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from regard.studies.picture import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome


def draw(outcome: Outcome, figure: Figure) -> None:
    """Draw refusals over the number of experts off, the random sets of every seed, and one map of experts."""
    sweep, sets, grid = figure.subplots(1, 3, width_ratios=(1.1, 1, 1.3))
    _sweep(outcome, sweep)
    _sets(outcome, sets)
    _map(outcome, figure, grid)


def _sweep(outcome: Outcome, axes: Axes) -> None:
    told = outcome.details["sweep"]
    counts = told[0]["counts"]
    leading = np.array([one["leading"] for one in told])
    random_ = np.array([np.mean(one["random"], axis=1) for one in told])
    for lines, colour, name in (
        (leading, COLOURS["orange"], "leading"),
        (random_, COLOURS["grey"], "random, firing as much"),
    ):
        axes.plot(counts, 100 * lines.T, color=colour, alpha=0.3, linewidth=1)
        axes.plot(counts, 100 * lines.mean(0), color=colour, marker="o", label=name)
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set(xlabel="experts off, of 128", ylabel="kept questions refused (%)", ylim=(-4, 104))
    axes.set_title("Refusals left")
    axes.legend(frameon=False, loc="lower left")


def _sets(outcome: Outcome, axes: Axes) -> None:
    for seed, (lifts, lifted) in enumerate(
        zip(outcome.details["lifts"], outcome.details["lifted"], strict=True)
    ):
        places = seed + np.linspace(-0.2, 0.2, len(lifts))
        axes.plot(
            places, 100 * np.array(lifts), ".", color=COLOURS["grey"], label=None if seed else "a random set"
        )
        axes.plot([seed], [100 * lifted], "D", color=COLOURS["orange"], label=None if seed else "the leading")
    axes.set_xticks(range(len(outcome.details["lifted"])))
    axes.set(xlabel="trained model", ylabel="refusals ended (points)")
    axes.set_title("10 experts off")
    axes.legend(frameon=False)


def _map(outcome: Outcome, figure: Figure, axes: Axes) -> None:
    scores = np.array(outcome.details["scores"][0])
    most = float(np.abs(scores).max()) or 1.0
    shown = axes.imshow(scores, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    for layer, expert in outcome.details["leading"][0]:
        axes.plot(expert, layer, "s", markersize=7, markerfacecolor="none", markeredgecolor="black")
    axes.set(xlabel="expert", ylabel="layer", yticks=range(len(scores)))
    axes.set_title("Use for refused − for open questions, model 0")
    figure.colorbar(shown, ax=axes, fraction=0.05, label="weight a token")
