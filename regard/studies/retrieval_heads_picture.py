"""What the outcome of `retrieval-heads` tells besides its measures, and its picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from regard.studies.claims import shown
from regard.studies.picture import COLOURS, intervals, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

TASKS = {"needle": "hidden fact", "copying": "list to copy", "knowing": "known word"}
MASKS = {
    "": ("no head off", "grey"),
    "_top": ("10 leading heads off", "orange"),
    "_random": ("10 others off", "sky"),
}


def collect(runs: Sequence[Any]) -> dict[str, Any]:
    """Return the map of heads, the scores on both sets of the first seed, and remarks."""
    scores = np.mean([np.mean(run["scores"], axis=0) for run in runs], axis=0)
    return {
        "map": np.round(scores.reshape(runs[0]["shape"]), 3).tolist(),
        "first": runs[0]["scores"][0],
        "second": runs[0]["scores"][1],
        "leading": [[[site, head, round(score, 3)] for site, head, score in run["heads"]] for run in runs],
        "remarks": _remarks(runs),
    }


def _remarks(runs: Sequence[Any]) -> list[str]:
    total = len(runs[0]["scores"][0])
    answered = [run["counted"] for run in runs]
    named = Counter(f"{site.rpartition('.')[2]}.{head}" for run in runs for site, head, _ in run["heads"])
    always = [head for head, count in named.most_common() if count == len(runs)]
    retrieval = np.mean([run["retrieval"] for run in runs]) / total
    never = np.mean([run["never"] for run in runs]) / total
    pearson = ", ".join(f"{run['pearson']:.2f}" for run in runs)
    return [
        f"Answered, and so counted, were {sum(map(sum, answered))} prompts in all: "
        f"{', '.join(f'{a} and {b}' for a, b in answered)} of the two sets, seed by seed.",
        f"{shown(float(retrieval), '%')} of {total} heads have a score of 0.1 or more (paper: 3 to 6 %), and "
        f"{shown(float(never), '%')} never copy (45 to 73 %).",
        f"{len(always)} heads lead for every seed: {', '.join(always)} (layer.head).",
        f"Pearson's correlation of the two sets' scores, seed by seed: {pearson}.",
        f"A head that looks anywhere would have a score of {np.mean([run['chance'] for run in runs]):.4f}.",
    ]


def draw(outcome: Outcome, figure: Figure) -> None:
    """Draw the map of heads, what is found again with heads off, perplexity, and the two sets' scores."""
    heads, answers, losses, sets = figure.subplots(1, 4, width_ratios=(1, 1.5, 0.9, 1.2))
    told, size = outcome.details, outcome.size
    _map(heads, np.asarray(told["map"], dtype=float))
    _answers(answers, outcome)
    _perplexity(losses, outcome)
    _sets(sets, told)
    quick = ", quick run" if outcome.quick else ""
    figure.suptitle(
        f"Retrieval heads in SmolLM2-135M: {size['seeds']} seeds, {size['facts']} facts a set, texts "
        f"of {size['length']} tokens{quick}.\nHeads are ranked on one set of facts and switched off (outputs "
        "zero) on another that shares none. Lines on bars are 95 % intervals over seeds.",
        fontsize=10.5,
    )


def _map(axis: Axes, scores: np.ndarray) -> None:
    image = axis.imshow(scores, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axis.set(title="Which heads copy?", xlabel="head", ylabel="layer")
    axis.set_xticks(range(scores.shape[1]))
    axis.spines[:].set_visible(False)
    axis.figure.colorbar(image, ax=axis, label="retrieval score, mean", shrink=0.9)


def _answers(axis: Axes, outcome: Outcome) -> None:
    for offset, (mask, (label, colour)) in enumerate(MASKS.items()):
        means, reach = intervals(outcome, [f"{task}{mask}" for task in TASKS])
        at = np.arange(len(TASKS)) + 0.27 * (offset - 1)
        axis.bar(at, means, 0.25, yerr=reach, color=COLOURS[colour], label=label, ecolor="#222222")
    axis.set_xticks(range(len(TASKS)), TASKS.values())
    axis.set(title="What is found again?", ylabel="recall of its words")
    axis.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, columnspacing=0.8)
    percent(axis, 1.05)


def _perplexity(axis: Axes, outcome: Outcome) -> None:
    means, reach = intervals(outcome, [f"perplexity{mask}" for mask in MASKS])
    colours = [COLOURS[colour] for _, colour in MASKS.values()]
    axis.bar(range(len(MASKS)), means, 0.6, yerr=reach, color=colours, ecolor="#222222")
    axis.axhline(1.15 * means[0], color="#222222", linestyle=":", linewidth=1)
    axis.annotate(
        "15 % more", (1.5, 1.15 * means[0]), (0, 3), textcoords="offset points", fontsize=9, ha="center"
    )
    axis.set_xticks(range(len(MASKS)), ["none", "leading", "others"])
    axis.set(title="Other texts", ylabel="perplexity", xlabel="heads off")


def _sets(axis: Axes, told: dict[str, Any]) -> None:
    axis.scatter(told["first"], told["second"], s=14, color=COLOURS["blue"], alpha=0.6, linewidth=0)
    axis.plot([0, 1], [0, 1], ":", color="#222222", linewidth=1)
    axis.set(title="Two sets of facts, first seed", xlabel="score on one", ylabel="score on the other")
