"""The picture of `lightning-attention`: time a token by length, and losses at and beyond the trained "
"length."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regard.studies.picture import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

METHODS = {"chunk": ("in chunks", "blue"), "naive": ("masked product", "grey")}
MODELS = {
    "alibi": "decay,\nalibi", "paper": "decay,\npaper", "none": "no decay", "softmax": "softmax,\nrotary",
}  # fmt: skip


def draw(outcome: Outcome, figure: Figure) -> None:
    """Draw the outcome."""
    left, right = figure.subplots(1, 2)
    _speed(left, outcome)
    _losses(right, outcome)


def _speed(axes: Axes, outcome: Outcome) -> None:
    told = outcome.details["microseconds"]
    for method, (label, colour) in METHODS.items():
        points = sorted(
            (int(name.split()[1]), value) for name, value in told.items() if name.split()[0] == method
        )
        axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[colour], label=label)
    axes.set_xscale("log", base=2)
    ticks = sorted({int(name.split()[1]) for name in told})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_ylim(0)
    axes.set_xlabel("tokens")
    axes.set_ylabel("microseconds a token, the fastest round")
    axes.set_title("Eight heads of width 64, forward, float32")
    axes.legend()


def _losses(axes: Axes, outcome: Outcome) -> None:
    highest = 0.0
    for place, name in enumerate(MODELS):
        for shift, length, colour in ((-0.2, 64, "blue"), (0.2, 256, "orange")):
            values = outcome.measures[f"{name}_{length}"]["values"]
            label = None if place else f"at {length} symbols{' (as trained)' if length == 64 else ''}"
            mean = sum(values) / len(values)
            highest = max(highest, *values)
            axes.bar(place + shift, mean, 0.38, color=COLOURS[colour], alpha=0.5, label=label)
            axes.plot([place + shift] * len(values), values, "o", color=COLOURS[colour], markersize=4)
    axes.axhline(outcome.details["best"], color=COLOURS["grey"], linestyle=":", linewidth=1)
    axes.set_xticks(range(len(MODELS)), list(MODELS.values()))
    axes.set_ylim(0, 1.15 * highest)
    axes.set_ylabel("held-out loss, nats")
    axes.set_title("Markov source of second order, a dot a seed (dotted: who knows the source)")
    axes.legend(loc="upper left", ncols=2)
