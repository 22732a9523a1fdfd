"""The picture of `ulsam`: accuracy of the arms, what is saved, and how uneven maps are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regard.studies.picture import COLOURS, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

ARMS = {
    "full": ("all layers", "green"), "ulsam": ("subspace\nattention,\nfour maps", "blue"),
    "one_map": ("subspace\nattention,\none map", "sky"), "identity": ("nothing", "grey"),
    "squeeze": ("channel\nweights", "orange"),
}  # fmt: skip
COUNTS = {"two": "two replaced", "four": "four replaced", "added": "added to two"}


def draw(outcome: Outcome, figure: Figure) -> None:
    """Draw the outcome."""
    grid = figure.add_gridspec(2, 2)
    _arms(figure.add_subplot(grid[0, :]), outcome)
    _counts(figure.add_subplot(grid[1, 0]), outcome)
    _maps(figure.add_subplot(grid[1, 1]), outcome)


def _arms(axes: Axes, outcome: Outcome) -> None:
    sizes = outcome.details["parameters"]
    for at, (arm, (_, colour)) in enumerate(ARMS.items()):
        values = outcome.measures[f"right_{arm}"]["values"]
        axes.bar(at, outcome.value(f"right_{arm}"), color=COLOURS[colour], alpha=0.5, width=0.6)
        axes.plot([at] * len(values), values, "o", color=COLOURS[colour], markersize=5)
    axes.set_xticks(
        range(len(ARMS)), [f"{told}\n({sizes[arm]:,} parameters)" for arm, (told, _) in ARMS.items()]
    )
    axes.axhline(0.1, color=COLOURS["grey"], linestyle=":", linewidth=1)
    percent(axes, 1.02)
    axes.set_ylabel("marks named rightly")
    axes.set_title("Two layers of a small MobileNet-V2, and what stands in their place (dotted: a guess)")


def _counts(axes: Axes, outcome: Outcome) -> None:
    for shift, name, colour in ((-0.2, "operations", "blue"), (0.2, "parameters", "orange")):
        values = [outcome.value(f"{name}_{count}") for count in COUNTS]
        places = [at + shift for at in range(len(COUNTS))]
        axes.bar(places, values, color=COLOURS[colour], width=0.36, label=f"fewer {name}")
    axes.set_xticks(range(len(COUNTS)), list(COUNTS.values()))
    percent(axes, 0.3)
    axes.set_title("MobileNet-V2 at 224 x 224")
    axes.legend(fontsize=9)


def _maps(axes: Axes, outcome: Outcome) -> None:
    for place, colour in ((0, "blue"), (1, "sky")):
        told = [maps[place] for maps in outcome.details["maps"]]
        side = round((1 / told[0]["even"]) ** 0.5)
        seeds = range(len(told))
        axes.plot(
            seeds,
            [one["most"] for one in told],
            "o",
            color=COLOURS[colour],
            label=f"{side} x {side}, trained",
        )
        axes.axhline(told[0]["even"], color=COLOURS[colour], linestyle=":", label=f"{side} x {side}, even")
    axes.set_xticks(range(len(outcome.details["maps"])))
    axes.set_xlabel("seed")
    axes.set_ylim(0, 0.3)
    axes.set_ylabel("largest weight of a map")
    axes.set_title("Maps of subspace attention, four groups")
    axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, 0.78), ncols=2)
