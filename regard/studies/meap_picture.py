"""The picture of `meap`: answers while learning, loss, where attention goes, and answers by depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from regard.studies.picture import COLOURS, intervals, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

ARMS = {"plain": ("plain", "grey"), "meap": ("15 % hidden", "blue"), "random": ("15 % random", "orange")}
QUARTERS = ("first", "second", "third", "last")


def collect(runs: Mapping[str, Sequence[Any]], learning: tuple[float, float]) -> dict[str, Any]:
    """Return what the picture needs: the curves of all arms, and answers by depth while plain ones learn."""
    curves = {
        arm: {
            name: [[round(value, 4) for value in run[name]] for run in told] for name in ("answers", "filler")
        }
        for arm, told in runs.items()
    }
    depths: dict[str, list[float]] = {}
    for arm, told in runs.items():
        chosen = [
            run["depths"][at]
            for run, plain in zip(told, runs["plain"], strict=True)
            for at, right in enumerate(plain["answers"])
            if learning[0] <= right <= learning[1]
        ]
        depths[arm] = [round(sum(one) / len(one), 4) for one in zip(*chosen, strict=True)]
    return {
        "steps": runs["plain"][0]["steps"],
        "curves": curves,
        "depths": depths,
        "learning": list(learning),
    }


def draw(outcome: Outcome, figure: Figure) -> None:
    """Draw the outcome."""
    grid = figure.add_gridspec(2, 6)
    _curves(figure.add_subplot(grid[0, :4]), outcome, "answers", "Questions answered on held-out texts")
    _curves(figure.add_subplot(grid[0, 4:]), outcome, "filler", "Loss on clean filler, nats")
    _bars(figure.add_subplot(grid[1, :2]), outcome, "masked", "Mean attention on a masked key", 1.25)
    _bars(figure.add_subplot(grid[1, 2:4]), outcome, "fact", "From a question on its fact", 1.25)
    _depths(figure.add_subplot(grid[1, 4:]), outcome)


def _curves(axes: Axes, outcome: Outcome, name: str, title: str) -> None:
    steps = outcome.details["steps"]
    for arm, (label, colour) in ARMS.items():
        seeds = outcome.details["curves"][arm][name]
        for one in seeds:
            axes.plot(steps, one, color=COLOURS[colour], linewidth=0.7, alpha=0.45)
        mean = [sum(at) / len(at) for at in zip(*seeds, strict=True)]
        axes.plot(steps, mean, color=COLOURS[colour], label=label)
    if name == "answers":
        low, high = outcome.details["learning"]
        axes.axhspan(low, high, color=COLOURS["grey"], alpha=0.1, linewidth=0)
        percent(axes, 1.02)
        axes.legend(loc="center right", bbox_to_anchor=(1.0, 0.6))
    else:
        axes.set_yscale("log")
    axes.set_xlabel("steps")
    axes.set_title(title)


def _bars(axes: Axes, outcome: Outcome, name: str, title: str, room: float) -> None:
    names = [f"{name}_{arm}" for arm in ARMS]
    means, errors = intervals(outcome, names)
    colours = [COLOURS[colour] for _, colour in ARMS.values()]
    axes.bar(range(len(names)), means, color=colours, alpha=0.6, width=0.6, yerr=errors, capsize=4)
    for at, one in enumerate(names):
        values = outcome.measures[one]["values"]
        axes.plot([at] * len(values), values, "o", color="black", markersize=3)
    axes.set_xticks(range(len(names)), [label for label, _ in ARMS.values()])
    if name == "fact":
        axes.axhline(outcome.value("fact_even"), color=COLOURS["grey"], linestyle=":", linewidth=1.5)
        axes.set_xlabel("dotted: even attention")
    top = max(mean + more for mean, more in zip(means, errors[1], strict=True))
    percent(axes, room * top)
    axes.set_title(title)


def _depths(axes: Axes, outcome: Outcome) -> None:
    for shift, (arm, (label, colour)) in zip((-0.27, 0.0, 0.27), ARMS.items(), strict=True):
        values = outcome.details["depths"][arm]
        places = [at + shift for at in range(len(values))]
        axes.bar(places, values, color=COLOURS[colour], alpha=0.8, width=0.25, label=label)
    axes.set_xticks(range(len(QUARTERS)), list(QUARTERS))
    percent(axes, 1.02)
    axes.set_xlabel("quarter of the text that the fact is in")
    axes.set_title("Answered while plain training has 30 to 80 %")
