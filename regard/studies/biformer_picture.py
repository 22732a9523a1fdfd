"""The picture of `biformer`: what routing finds, what a layer learns by it, its scores, and images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regard.studies.picture import COLOURS, intervals, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

WAYS = {"best": ("best four", "grey"), "routed": ("routed", "blue"), "nearest": ("nearest", "orange"),
        "random": ("random", "pink")}  # fmt: skip
SHARES = {"pure": "all", "mixed": "60 %", "stray": "30 %"}
ARMS = {
    "recall_routed": ("routed", "blue"), "recall_full": ("all\nregions", "grey"),
    "recall_nearest": ("nearest", "orange"), "recall_random": ("random", "pink"),
    "recall_shared_routed": ("routed,\nshared", "blue"), "recall_shared_full": ("all,\nshared", "grey"),
}  # fmt: skip
MODELS = {
    "routed": ("routed", "blue"), "random": ("random", "pink"), "nearest": ("nearest", "orange"),
    "full": ("all\nregions", "grey"), "none": ("no\nattention", "sky"),
    "convolved": ("convo-\nlutions", "green"),
}  # fmt: skip


def draw(outcome: Outcome, figure: Figure) -> None:
    """Draw the outcome."""
    (found, learned), (cost, images) = figure.subplots(2, 2)
    _found(found, outcome)
    _learned(learned, outcome)
    _cost(cost, outcome)
    _images(images, outcome)


def _found(axes: Axes, outcome: Outcome) -> None:
    for number, (way, (label, colour)) in enumerate(WAYS.items()):
        names = [f"{share}_{way}" for share in SHARES]
        means, spans = intervals(outcome, names)
        places = [at + 0.2 * (number - 1.5) for at in range(len(SHARES))]
        axes.bar(places, means, yerr=spans, width=0.18, color=COLOURS[colour], label=label, capsize=2)
    axes.set_xticks(range(len(SHARES)), list(SHARES.values()))
    axes.set_xlabel("tokens of a region on its theme")
    percent(axes, 1.0)
    axes.set_title("Dense attention inside four of 49 regions")
    axes.legend(fontsize=9)


def _learned(axes: Axes, outcome: Outcome) -> None:
    for place, (name, (_, colour)) in enumerate(ARMS.items()):
        at = place + (0.5 if "shared" in name else 0)
        values = outcome.measures[name]["values"]
        axes.bar(at, outcome.value(name), color=COLOURS[colour], alpha=0.5, width=0.7)
        axes.plot([at] * len(values), values, "o", color=COLOURS[colour], markersize=4)
    places = [i + (0.5 if "shared" in name else 0) for i, name in enumerate(ARMS)]
    axes.set_xticks(places, [label for label, _ in ARMS.values()], fontsize=8)
    axes.axhline(outcome.details["guess"], color=COLOURS["grey"], linestyle=":", linewidth=1)
    percent(axes, 1.05)
    axes.set_title("Values recalled; shared: queries share a vector; dotted: a guess", fontsize=10)


def _cost(axes: Axes, outcome: Outcome) -> None:
    told = outcome.details
    tokens = [side**2 for side in told["sides"]]
    axes.plot(tokens, [n**2 for n in tokens], "o-", color=COLOURS["grey"], label="full attention, power 2")
    axes.plot(
        tokens, told["scores"], "o-", color=COLOURS["blue"],
        label=f"two levels, four regions, power {outcome.value('exponent'):.3f}",
    )  # fmt: skip
    for x, y, n in zip(tokens, told["scores"], told["regions"], strict=True):
        axes.annotate(f"{n} x {n}", (x, y), xytext=(4, -11), textcoords="offset points", fontsize=7)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("tokens of a map")
    axes.set_ylabel("scores")
    axes.set_title("Scores at the best number of regions")
    axes.legend(fontsize=9)


def _images(axes: Axes, outcome: Outcome) -> None:
    least = 1.0
    for group, name in enumerate(("digits", "textures")):
        for place, (arm, (_, colour)) in enumerate(MODELS.items()):
            at = place + group * (len(MODELS) + 0.7)
            values = outcome.measures[f"{name}_{arm}"]["values"]
            axes.plot([at] * len(values), values, "o", color=COLOURS[colour], markersize=4, alpha=0.6)
            axes.plot([at - 0.3, at + 0.3], [outcome.value(f"{name}_{arm}")] * 2, color=COLOURS[colour])
            least = min(least, *values)
    places = [i + g * (len(MODELS) + 0.7) for g in (0, 1) for i in range(len(MODELS))]
    axes.set_xticks(places, [label for label, _ in MODELS.values()] * 2, fontsize=6)
    percent(axes, 1.0)
    axes.set_ylim(max(0.0, least - 0.03), 1.005)
    axes.set_title("Held-out images classified rightly: digits (left), textures", fontsize=10)
