"""The picture of `halonet`: marks inside blocks and across their edges, textures, cost by pixels, faults."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regard.studies.picture import COLOURS, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

MARKS = {
    "halo": ("blocks of 4,\nhalo of 2", "blue"), "blocks": ("blocks of 4,\nno halo", "orange"),
    "window": ("blocks of 8,\nno halo", "yellow"), "unplaced": ("halo, no\npositions", "grey"),
}  # fmt: skip
WAYS = {
    "halo": ("ours", "blue"), "unfolded": ("unfolded", "orange"), "dense": ("SDPA under the mask", "grey"),
}  # fmt: skip
NETWORKS = {
    "halo": ("halo", "blue"), "blocks": ("no halo", "orange"), "convolution": ("3 x 3\nconvolution", "green"),
    "alone": ("every pixel\nalone", "grey"),
}  # fmt: skip
FAULTS = {
    "centred": "tables\ncentred", "swapped": "tables\nswapped", "masked": "border\nmasked",
    "reduced": "queries\ncounted",
}  # fmt: skip


def draw(outcome: Outcome, figure: Figure) -> None:
    """Draw the outcome."""
    (marks, textures), (time, faults) = figure.subplots(2, 2)
    _marks(marks, outcome)
    _textures(textures, outcome)
    _time(time, outcome)
    _faults(faults, outcome)


def _bar(axes: Axes, outcome: Outcome, name: str, at: float, colour: str, width: float, alpha: float) -> None:
    values = outcome.measures[name]["values"]
    axes.bar(at, outcome.value(name), color=COLOURS[colour], alpha=alpha, width=width)
    axes.plot([at] * len(values), values, "o", color=COLOURS[colour], markersize=4)


def _marks(axes: Axes, outcome: Outcome) -> None:
    for place, (name, (_, colour)) in enumerate(MARKS.items()):
        _bar(axes, outcome, f"inside_{name}", place - 0.2, colour, 0.36, 0.25)
        _bar(axes, outcome, f"across_{name}", place + 0.2, colour, 0.36, 0.7)
    axes.axhline(0.5, color=COLOURS["grey"], linestyle=":", linewidth=1)
    axes.set_xticks(range(len(MARKS)), [label for label, _ in MARKS.values()], fontsize=9)
    percent(axes, 1.02)
    axes.set_title("Marks told rightly: inside the block (pale), across its edge (dark)")


def _textures(axes: Axes, outcome: Outcome) -> None:
    for place, (name, (_, colour)) in enumerate(NETWORKS.items()):
        _bar(axes, outcome, f"images_{name}", place, colour, 0.6, 0.5)
    axes.axhline(1 / 8, color=COLOURS["grey"], linestyle=":", linewidth=1)
    axes.set_xticks(range(len(NETWORKS)), [label for label, _ in NETWORKS.values()], fontsize=9)
    percent(axes, 1.02)
    counts = outcome.details["parameters"].values()
    axes.set_title(f"Textures told rightly, {min(counts):,} to {max(counts):,} parameters")


def _time(axes: Axes, outcome: Outcome) -> None:
    told = outcome.details["milliseconds"]
    for way, (label, colour) in WAYS.items():
        found = {int(name.split()[1]): ms for name, ms in told.items() if name.startswith(f"{way} ")}
        axes.plot([side**2 for side in found], list(found.values()), "o-", color=COLOURS[colour], label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("pixels of a map")
    axes.set_ylabel("ms, one thread")
    powers = outcome.value("growth"), outcome.value("growth_dense")
    axes.set_title("Time; ours grows with pixels to the power {:.2f}, dense {:.2f}".format(*powers))
    axes.legend(fontsize=9)


def _faults(axes: Axes, outcome: Outcome) -> None:
    told = outcome.details["faults"]
    for place, name in enumerate(FAULTS):
        axes.bar(place, told[name], color=COLOURS["orange"], width=0.6, alpha=0.7)
    axes.bar(len(FAULTS), outcome.value("error"), color=COLOURS["blue"], width=0.6)
    axes.set_yscale("log")
    axes.set_xticks(range(len(FAULTS) + 1), [*FAULTS.values(), "none"], fontsize=9)
    axes.set_ylabel("largest difference")
    axes.set_title("Difference from the rule, with a planted fault and without")
