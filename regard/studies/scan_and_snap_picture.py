"""The picture of `scan-and-snap`: what attention leaves and keeps, how fast, and how sparse it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regard.studies.picture import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

COURSES = {"plain": "blue", "adam": "orange", "frozen": "grey", "telling nothing": "pink"}
RATIOS = {"ratio 1": "blue", "ratio 2": "sky", "ratio 5": "green", "ratio 10": "orange"}


def draw(outcome: Outcome, figure: Figure) -> None:
    """Draw the outcome."""
    (one, two), (three, four) = figure.subplots(2, 2)
    small = outcome.details["small"]
    for name, colour in COURSES.items():
        one.plot(small[name]["common"], color=COLOURS[colour], label=name)
    one.set_ylim(0, 1)
    one.legend()
    _titled(one, "Attention on common tokens")
    for place, line in enumerate(small["plain"]["distinct"]):
        two.plot(line, color=COLOURS["blue"], alpha=0.3 + 0.2 * place)
    _titled(two, "Attention on four distinct tokens, rare (pale) to frequent")
    for name in ("plain", "adam"):
        three.plot(small[name]["speed"][1:], color=COLOURS[COURSES[name]], label=name)
    three.set_yscale("log")
    three.legend()
    _titled(three, "How far attention moves in a step")
    for name, colour in RATIOS.items():
        for seed, line in enumerate(outcome.details["entropy"][name]):
            label = f"decoder {name.split()[1]} x as fast" if not seed else None
            four.plot(line, color=COLOURS[colour], linewidth=1.2, label=label)
    four.legend()
    _titled(four, "Entropy in nats, three last tokens, a line a seed")


def _titled(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("step")
