"""What the outcome of `circuit-reuse` tells besides its measures, and its picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from regard.studies.picture import COLOURS, intervals, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

SHARES = (0.01, 0.02, 0.05, 0.1)
FORCED = {
    "ld": "as it is", "ld_io": "two leaders onto\nindirect object",
    "ld_s2": "two leaders onto\nsecond subject",
    "ld_random": "random heads onto\nindirect object",
}  # fmt: skip
COLOURED = {
    "co": "as it is", "co_wrong": "suppressor onto wrong colours", "co_right": "suppressor onto right colour",
    "co_positions": "suppressor onto random positions", "co_others": "random heads onto wrong colours",
    "co_leaders": "two leaders onto wrong colours", "co_mover": "mover onto wrong colours",
}  # fmt: skip
CONTROLS = ("ld", "ld_random", "co", "co_positions", "co_others")


def collect(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return effects, overlaps, the heads of every seed, and remarks."""
    found = list(results.values())
    ranks = [x for one in found for stages in one["stability"].values() for x in stages.values()]
    return {
        "effects": [one["effects"] for one in found],
        "overlaps": {name: [one["overlaps"][name] for one in found] for name in ("second", "weekday")},
        "chance": [one["chance"] for one in found],
        "heads": [one["heads"] for one in found],
        "stability": [one["stability"] for one in found],
        "remarks": [
            "Rank correlation of two halves of the prompts, over circuits and stages: "
            f"{min(ranks):.2f} to {max(ranks):.2f}.",
            "The forcing in colored objects is told which colours are wrong.",
        ],
    }


def draw(outcome: Outcome, figure: Figure) -> None:
    """Draw four panels: the heads that act on the movers, forcing them, overlaps, colours."""
    (effects, forcing), (overlaps, colours) = figure.subplots(2, 2)
    for number, row in enumerate(outcome.details["effects"]):
        x = np.arange(1, len(row) + 1) + 0.12 * (number - 1.5)
        effects.plot(x, row, "o", color=COLOURS["blue"], markersize=4, alpha=0.7)
    effects.set(
        title="Heads that act on the movers' queries", xlabel="rank", ylabel="|effect|", ylim=(0, None)
    )
    _bars(forcing, outcome, FORCED)
    forcing.set(title="Making heads look elsewhere", xlabel="logit difference")
    _overlaps(overlaps, outcome.details)
    _bars(colours, outcome, COLOURED)
    colours.set(title="Colored objects", xlabel="right colour above both others", xlim=(0, 1))
    figure.suptitle(
        f"Circuit reuse: SmolLM2-135M-Instruct, {outcome.size['seeds']} seeds of {outcome.size['prompts']} "
        f"prompts{', quick run' if outcome.quick else ''}. Grey: controls. Lines on bars are 95 % intervals.",
        fontsize=10.5,
    )


def _overlaps(axis: Axes, details: Mapping[str, Any]) -> None:
    lines = {
        "two sets of templates": (details["overlaps"]["second"], "blue"),
        "next weekday": (details["overlaps"]["weekday"], "orange"),
        "chance": (details["chance"], "grey"),
    }
    for label, (rows, colour) in lines.items():
        axis.plot(range(len(SHARES)), np.mean(rows, 0), "o-", color=COLOURS[colour], label=label)
        for row in rows:
            axis.plot(range(len(SHARES)), row, ".", color=COLOURS[colour], alpha=0.4)
    axis.set_xticks(range(len(SHARES)), [f"{share:.0%}" for share in SHARES])
    axis.set(title="Overlap with the circuit of indirect objects", xlabel="share of all heads a stage keeps")
    percent(axis)
    axis.legend(fontsize=8)


def _bars(axis: Axes, outcome: Outcome, labels: Mapping[str, str]) -> None:
    means, reach = intervals(outcome, list(labels))
    shades = [COLOURS["grey" if name in CONTROLS else "blue"] for name in labels]
    axis.barh(range(len(labels)), means, xerr=reach, color=shades, ecolor="#222222", height=0.6)
    axis.set_yticks(range(len(labels)), list(labels.values()), fontsize=8)
    axis.invert_yaxis()
