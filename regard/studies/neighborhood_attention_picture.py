"""The picture of `neighborhood-attention`: cost by tokens, gains of tiles, and labels that models learned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regard.studies.picture import COLOURS, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

WAYS = {"near": ("windows of 7 x 7", "blue"), "dense": ("SDPA under their mask", "grey")}
LABELS = {
    "next_window": ("windows\nof 9", "blue"), "next_blocks": ("blocks\nof 16", "orange"),
    "next_unplaced": ("windows,\nno bias", "grey"), "next_whole": ("all 144", "pink"),
    "fifth_plain": ("windows\nof 9", "grey"), "fifth_dilated": ("dilated\n1 and 4", "blue"),
}  # fmt: skip


def draw(outcome: Outcome, figure: Figure) -> None:
    """Draw the outcome."""
    (time, memory), (gains, labels) = figure.subplots(2, 2)
    _time(time, outcome)
    _memory(memory, outcome)
    _gains(gains, outcome)
    _labels(labels, outcome)


def _time(axes: Axes, outcome: Outcome) -> None:
    told = outcome.details["milliseconds"]
    for way, (label, colour) in WAYS.items():
        found = {int(name.split()[1]): ms for name, ms in told.items() if name.startswith(f"{way} ")}
        power = outcome.value("growth" if way == "near" else "growth_dense")
        axes.plot(
            [side**2 for side in found], list(found.values()), "o-", color=COLOURS[colour],
            label=f"{label}, tokens to the power {power:.2f}",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("tokens of a plane")
    axes.set_ylabel("ms, one thread")
    axes.set_title("Time")
    axes.legend(fontsize=9)


def _memory(axes: Axes, outcome: Outcome) -> None:
    told = outcome.details["kilobytes"]
    sides = list(
        dict.fromkeys(int(name.split()[1]) for name in outcome.details["milliseconds"] if " " in name)
    )
    for way, (label, colour) in WAYS.items():
        axes.plot([side**2 for side in sides], told[way], "o-", color=COLOURS[colour], label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("tokens of a plane")
    axes.set_ylabel("kB a token")
    axes.set_title("Memory of a call")
    axes.legend(fontsize=9)


def _gains(axes: Axes, outcome: Outcome) -> None:
    told = outcome.details["gains"]
    for place, (name, gain) in enumerate(told.items()):
        axes.bar(place, gain, color=COLOURS["blue" if name.startswith("1d") else "sky"], width=0.7)
    axes.axhline(2, color=COLOURS["grey"], linestyle=":", linewidth=1)
    names = [shape.split() for shape in told]
    axes.set_xticks(
        range(len(told)),
        [f"{n},\n{k}" if kind == "1d" else f"{n} x {n},\n{k} x {k}" for kind, n, k in names],
        fontsize=8,
    )
    axes.set_ylabel("gathered keys / tiles")
    axes.set_title("Gain of tiles on lines and planes (grid, window)")


def _labels(axes: Axes, outcome: Outcome) -> None:
    for place, (name, (_, colour)) in enumerate(LABELS.items()):
        at = place + (0.5 if name.startswith("fifth") else 0)
        values = outcome.measures[name]["values"]
        axes.bar(at, outcome.value(name), color=COLOURS[colour], alpha=0.5, width=0.7)
        axes.plot([at] * len(values), values, "o", color=COLOURS[colour], markersize=4)
    places = [i + (0.5 if name.startswith("fifth") else 0) for i, name in enumerate(LABELS)]
    axes.set_xticks(places, [label for label, _ in LABELS.values()], fontsize=8)
    axes.axhline(outcome.details["guess"], color=COLOURS["grey"], linestyle=":", linewidth=1)
    percent(axes, 1.02)
    axes.set_title("Label: the colour next above (four), fifth above (two); dotted: a guess")
