"""The picture of `attention-calibration`: accuracy and loss of every treatment, and the heads kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regard.studies.picture import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

SHORT = {
    "plain": "as it is", "filtered": "ACT, heads kept", "random": "ACT, random heads",
    "first": "first token,\nheads kept", "temperature": "temperature,\nheads kept", "all": "ACT, all heads",
    "delete_hidden": "hidden sinks\ndeleted, all", "delete_first": "first token\ndeleted, all",
}  # fmt: skip


def draw(outcome: Outcome, figure: Figure) -> None:
    """Draw the outcome."""
    one, two, three = figure.subplots(1, 3)
    _treatments(one, outcome, "", "Right answers, held-out items")
    _treatments(two, outcome, "loss_", "Log-loss without label bias, nats")
    two.set_yticklabels([])
    _heads(three, outcome)


def _treatments(axes: Axes, outcome: Outcome, kind: str, title: str) -> None:
    for place, name in enumerate(SHORT):
        told = outcome.measures[kind + name]
        colour = COLOURS["blue" if name == "filtered" else "grey"]
        low, high = (told[end] if told[end] is not None else told["value"] for end in ("low", "high"))
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
        axes.plot(told["value"], place, "o", color=colour)
    axes.axvline(outcome.measures[f"{kind}plain"]["value"], color="black", linewidth=0.6, linestyle=":")
    axes.set_yticks(range(len(SHORT)), list(SHORT.values()))
    axes.invert_yaxis()
    axes.set_title(title)


def _heads(axes: Axes, outcome: Outcome) -> None:
    for number, heads in enumerate(outcome.details["heads"]):
        places = [(int(site.rpartition(".")[2]), head) for site, head, _ in heads]
        shift = 0.2 * (number - (len(outcome.details["heads"]) - 1) / 2)
        axes.plot(
            [layer for layer, _ in places], [head + shift for _, head in places], "s", markersize=4,
            label=f"seed {number}: {len(heads)} kept, {outcome.details['chance'][number][0]:.0f} by chance",
        )  # fmt: skip
    axes.set_xlabel("layer")
    axes.set_ylabel("head")
    axes.set_title("Heads in which ACT raised accuracy")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.15), frameon=False)
