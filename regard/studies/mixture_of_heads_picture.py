"""The picture of the study of mixture of heads: answers of the small layer, and losses of SmolLM2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regard.studies.picture import COLOURS, intervals, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

SMALL = {
    "moh": "4 of 8,\nrouted", "unbalanced": "no\nbalance", "all_on": "8,\nweighted",
    "chance": "4, by\nchance", "dense8": "8,\nno gates", "dense4": "4,\nno gates",
}  # fmt: skip
CONVERTED = {
    "small_query_norm": "6 of 8, by\nquery norm", "small_learned": "6, learned\nrouter",
    "small_random": "6, by\nchance", "small_dense": "8, dense,\ntuned", "small_untuned": "6, not\ntuned",
}  # fmt: skip
CAME = {
    "came_query_norm": "query\nnorm", "came_random": "by\nchance", "came_magnitude": "pruned",
    "came_output_norm": "output\nnorm", "came_full": "all on", "came_plain": "SmolLM2",
}  # fmt: skip
TUNED = {
    "adapted_query_norm": "query norm,\nbefore", "tuned_query_norm": "query\nnorm",
    "tuned_learned": "learned", "tuned_random": "by\nchance", "tuned_magnitude": "pruned",
    "tuned_dense": "dense",
}  # fmt: skip
OURS = ("moh", "small_query_norm", "came_query_norm", "tuned_query_norm")


def draw(outcome: Outcome, figure: Figure) -> None:
    """Draw right answers trained and converted, and losses before and after tuning."""
    axes = figure.subplots(2, 2)
    for axis, names, title in (
        (axes[0][0], SMALL, "one layer of 8 heads of width 4, from nothing"),
        (axes[0][1], CONVERTED, "the same, converted from dense and tuned"),
    ):
        _bars(outcome, axis, names, title)
        percent(axis, 1.05)
        axis.set_ylabel("right answers")
    for axis, names, title in (
        (axes[1][0], CAME, "SmolLM2, 7 of 9 heads, not tuned"),
        (axes[1][1], TUNED, "SmolLM2, 7 of 9 heads, after the same tuning"),
    ):
        means = _bars(outcome, axis, names, title)
        axis.set_ylim(0.9 * min(means), 1.08 * max(means))
        axis.set_ylabel("loss, nats (not from 0)")


def _bars(outcome: Outcome, axis: Axes, names: dict[str, str], title: str) -> list[float]:
    means, spread = intervals(outcome, list(names))
    colours = [COLOURS["blue" if name in OURS else "grey"] for name in names]
    axis.bar(range(len(names)), means, yerr=spread, color=colours, capsize=3)
    axis.set_xticks(range(len(names)), names.values())
    axis.set_title(title)
    return means
