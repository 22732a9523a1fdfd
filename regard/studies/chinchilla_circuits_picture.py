"""The picture of `chinchilla-circuits`: ranks, random draws, nodes of two kinds of labels, words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regard.studies.picture import COLOURS, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

KINDS = {"ordered": ("labels A to D", "blue"), "random": ("letters drawn", "orange")}
SHOWN = 12


def draw(outcome: Outcome, figure: Figure) -> None:
    """Draw the outcome."""
    (ranks, nets), (nodes, words) = figure.subplots(2, 2)
    _ranks(ranks, outcome)
    _nets(nets, outcome)
    _nodes(nodes, outcome)
    _words(words, outcome)


def _ranks(axes: Axes, outcome: Outcome) -> None:
    told = outcome.details["ranks"]
    for kind, (label, colour) in KINDS.items():
        axes.plot(
            range(len(told)), [outcome.value(f"{kind}_{r}") for r in told], "o-", color=COLOURS[colour],
            markersize=5, label=label,
        )  # fmt: skip
        axes.axhline(outcome.value(f"{kind}_full"), color=COLOURS[colour], linestyle=":", linewidth=1)
    axes.set_xticks(range(len(told)), [str(r) for r in told])
    axes.set_xlabel("directions kept, fitted on A to D (dotted: all)")
    axes.set_title("Right answers with queries and keys of one layer compressed")
    percent(axes, 1.03)
    axes.legend(fontsize=9, loc="lower right")


def _nets(axes: Axes, outcome: Outcome) -> None:
    runs, told = outcome.details["runs"], outcome.details["ranks"]
    at = told.index(3)
    for place, run in enumerate(runs):
        first = not place
        drawn = [net for _, net in run["drawn"]]
        axes.plot([place] * len(drawn), drawn, "o", color=COLOURS["grey"], markersize=4, alpha=0.7,
                  label="random directions" if first else None)  # fmt: skip
        spans = [place - 0.25, place + 0.25]
        axes.plot(spans, [run["net_full"]["ordered"]] * 2, color=COLOURS["green"], linewidth=6, alpha=0.4,
                  label="all directions" if first else None)  # fmt: skip
        axes.plot(spans, [run["net"]["ordered"][at]] * 2, color=COLOURS["blue"],
                  label="fitted directions" if first else None)  # fmt: skip
    axes.set_xticks(range(len(runs)), [f"seed {n}" for n in range(len(runs))])
    axes.set_ylim(bottom=0)
    axes.set_ylabel("net logit, labels A to D")
    axes.set_title("Three directions, fitted and drawn")
    axes.legend(fontsize=9, loc="lower right")


def _nodes(axes: Axes, outcome: Outcome) -> None:
    run = outcome.details["runs"][0]["nodes"]
    effects = {kind: {(alias, head): x for alias, head, x in run[kind]} for kind in KINDS}
    most = {node: max(effects[kind][node] for kind in KINDS) for node in effects["ordered"]}
    chosen = sorted(most, key=lambda node: -most[node])[:SHOWN]
    for number, (kind, (label, colour)) in enumerate(KINDS.items()):
        places = [i + 0.38 * (number - 0.5) for i in range(len(chosen))]
        axes.bar(
            places, [effects[kind][node] for node in chosen], width=0.36, color=COLOURS[colour], label=label
        )
    names = [f"MLP {a.rpartition('.')[2]}" if h is None else f"{a.rpartition('.')[2]}.{h}" for a, h in chosen]
    axes.set_xticks(range(len(chosen)), names, fontsize=8, rotation=45)
    axes.set_ylabel("net direct effect, logits")
    axes.set_title("What carries the right label (seed 0; layer.head)")
    axes.legend(fontsize=9)


def _words(axes: Axes, outcome: Outcome) -> None:
    for place, (name, label, colour) in enumerate(
        (("label", "by the label", "blue"), ("content", "by the content", "green"))
    ):
        values = outcome.measures[name]["values"]
        axes.bar(place, outcome.value(name), width=0.5, color=COLOURS[colour], alpha=0.5)
        axes.plot([place] * len(values), values, "o", color=COLOURS[colour], markersize=4)
        axes.annotate(label, (place, 0.02), ha="center", fontsize=9)
    axes.axhline(0.25, color=COLOURS["grey"], linestyle=":", linewidth=1)
    axes.set_xticks([])
    axes.set_xlim(-0.6, 1.6)
    percent(axes, 1.0)
    axes.set_title("SmolLM2-135M-Instruct: right answers of four (dotted: a guess)")
