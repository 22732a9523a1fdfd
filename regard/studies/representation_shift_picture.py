"""What the outcome of `representation-shift` tells besides its measures, and its picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from regard.studies.picture import COLOURS, intervals

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regard.studies.outcome import Outcome

VARIANTS = ("shifted", "common", "other", "unshifted")
AT, HALF = "27", 0.5
LABELS = {
    "unshifted": "unshifted", "other": "another's", "common": "one for all", "shifted": "its own",
    "concept": "its own", "plain": "as it was", "tuned": "fine-tuned",
}  # fmt: skip
SHADES = {
    "plain": COLOURS["grey"], "random": COLOURS["grey"], "placebo": COLOURS["pink"],
    "other": COLOURS["pink"], "common": COLOURS["sky"], "concept": COLOURS["blue"],
    "tuned": COLOURS["green"],
}  # fmt: skip


def parts(results: Mapping[str, Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """The results of planted shifts, sentiment and fine-tunes."""
    names = ("planted", "sentiment", "fine-tunes")
    planted, sentiment, tuned = ([r for n, r in results.items() if n.startswith(name)] for name in names)
    return planted, sentiment, tuned


def measured(results: Mapping[str, Any], size: Any) -> dict[str, list[float]]:
    """Return the values of every quantity."""
    planted, sentiment, tuned = parts(results)
    found: dict[str, list[float]] = {}
    for name, kind in (("own", "own"), ("alike", "alike"), ("still", "none")):
        for how in VARIANTS:
            found[f"{name}_{how}"] = [run[kind][how] for run in planted]
    for name, key in (
        ("consistency",) * 2,
        ("chance",) * 2,
        ("distance",) * 2,
        ("distance_same", "same_distance"),
    ):
        found[f"still_{name}"] = [run["none"][key] for run in planted]
    for layer in size.layers:
        found[f"closed_{layer}"] = [run["layers"][str(layer)]["closed"] for run in sentiment]
    half = list(size.alphas).index(HALF)
    for layer in (22, 26):
        rows = [run["layers"][str(layer)] for run in sentiment]
        found[f"random_{layer}"] = [max(row["random"], key=abs) for row in rows]
        found[f"shuffled_{layer}"] = [float(np.mean(np.abs(row["shuffled"]))) for row in rows]
        for name in ("negated", "whole"):
            found[f"{name}_{layer}"] = [row[name] for row in rows]
        found[f"half_{layer}"] = [row["alphas"][half] for row in rows]
    for kind in ("scene", "drawn", "none"):
        for how in ("shifted", "common", "other"):
            found[f"{kind}_explained_{how}"] = [run[kind]["layers"][AT]["explained"][how] for run in tuned]
    for kind in ("scene", "drawn"):
        pair = (found[f"{kind}_explained_{how}"] for how in ("shifted", "common"))
        found[f"{kind}_gain"] = [a - b for a, b in zip(*pair, strict=True)]
    for how in VARIANTS:
        found[f"scene_cosine_{how}"] = [run["scene"]["layers"][AT][how] for run in tuned]
    for layer in ("24", "29"):
        found[f"scene_cosine_{layer}"] = [run["scene"]["layers"][layer]["shifted"] for run in tuned]
    for kind in ("scene", "none"):
        found[f"{kind}_norm"] = [run[kind]["layers"][AT]["norm"] for run in tuned]
    found["scene_accuracy"] = [run["scene"]["accuracy"] for run in tuned]
    found |= {
        f"{what}_{how}": [_added(run, how)[what] for run in tuned]
        for what, some in (("right", ("plain", "tuned", "concept", "common", "other")),
                           ("colour", ("plain", "tuned", "common", "random", "placebo")))
        for how in some
    }  # fmt: skip
    return found


def _added(run: Any, how: str) -> Any:
    if how == "plain":
        return run["plain"]
    return run["scene"] if how == "tuned" else run["added"][how]


def collect(results: Mapping[str, Any], size: Any) -> dict[str, Any]:
    """Return what the picture needs, and remarks."""
    _, sentiment, tuned = parts(results)
    layers = {
        str(layer): {
            name: [row["layers"][str(layer)][name] for row in sentiment]
            for name in ("closed", "whole", "random", "shuffled", "alphas")
        }
        for layer in size.layers
    }
    recovery = {
        str(layer): {how: _mean(tuned, "scene", layer, how) for how in VARIANTS} for layer in size.read
    }
    return {"layers": layers, "recovery": recovery, "remarks": _remarks(sentiment, tuned)}


def _mean(tuned: list[Any], kind: str, layer: int, what: str) -> float:
    return float(np.mean([run[kind]["layers"][str(layer)][what] for run in tuned]))


def _remarks(sentiment: list[Any], tuned: list[Any]) -> list[str]:
    gaps = ", ".join(f"{run['start']:.2f} to {run['start'] + run['gap']:.2f}" for run in sentiment)
    sizes = ", ".join(f"{layer}: {row['norm']:.1%}" for layer, row in sentiment[0]["layers"].items())
    told = [
        f"Logit of positive less that of negative, negative and positive prompts, seed by seed: {gaps}.",
        f"The vector's norm over that of the states, layer by layer, first seed: {sizes}.",
        "Consistency of shifts at layer 27, and what chance gives: "
        + "; ".join(
            f"{kind} {_mean(tuned, kind, 27, 'consistency'):.2f} ({_mean(tuned, kind, 27, 'chance'):.2f})"
            for kind in ("scene", "drawn", "none")
        ) + ".",
        "Words that the shifts of concepts make likelier, first seed: "
        + "; ".join(" ".join(words) for words in tuned[0]["words"]) + ".",
    ]  # fmt: skip
    for number, run in enumerate(tuned):
        told.append(f"Seed {number}: {_compared(run['added'])}")
    return told


def _compared(added: Any) -> str:
    """Prompt by prompt, a shift for each concept against one for all; another concept's is the placebo."""
    from regard.studies.paired import compare_paired

    [found] = compare_paired(
        {"concept": added["concept"]["items"]}, added["common"]["items"], placebo=added["other"]["items"]
    )
    effect, p = found.effect, "-" if found.p is None else f"{found.p:.3g}"
    over = found.over_placebo
    assert over is not None
    reach = "" if effect.low is None else f" [{effect.low:.2f}, {effect.high:.2f}]"
    return (
        f"over {found.items} prompts the scene's own colour gains {effect.value:+.2f}{reach} over one shift "
        f"for all (permutation p {p}), and {over.value:+.2f} over another concept's."
    )


def draw(outcome: Outcome, figure: Figure) -> None:
    """Draw sentiment by layer and by alpha, what shifts explain and recover, and what adding them does."""
    top, bottom = figure.subplots(2, 3)
    _planted(top[0], outcome)
    _depth(top[1], outcome)
    _alphas(top[2], outcome)
    _explained(bottom[0], outcome)
    _bars(bottom[1], outcome, "right", "Own colour of the scene", "logit over the other colours",
          ("plain", "other", "common", "concept", "tuned"))  # fmt: skip
    _bars(bottom[2], outcome, "colour", "Any colour", "probability",
          ("plain", "random", "placebo", "common", "tuned"))  # fmt: skip
    size = outcome.size
    quick = ", quick run of a random model" if outcome.quick else ""
    figure.suptitle(
        f"Concepts and shifts, SmolLM2-135M{quick}: {size['seeds']} seeds. Above: planted clusters, and a "
        "direction of sentiment added to negative reviews.\nBelow: fine-tuned by LoRA on captions, held-out "
        "captions of another thing and other places. Lines on bars are 95 % intervals.",
        fontsize=10.5,
    )


def _planted(axis: Axes, outcome: Outcome) -> None:
    kinds = {"own": "each its way", "alike": "all alike", "still": "none"}
    names = {"unshifted": "grey", "other": "pink", "common": "sky", "shifted": "blue"}
    for place, (how, colour) in enumerate(names.items()):
        means, reach = intervals(outcome, [f"{kind}_{how}" for kind in kinds])
        at = np.arange(len(kinds)) + 0.2 * (place - 1.5)
        axis.bar(at, means, 0.18, yerr=reach, color=COLOURS[colour], label=LABELS[how], ecolor="#222222")
    axis.set_xticks(range(len(kinds)), kinds.values())
    axis.set(title="Planted shifts, other half", ylabel="cosine with the partner", ylim=(0, 1.05))
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)


def _depth(axis: Axes, outcome: Outcome) -> None:
    told = outcome.details["layers"]
    at = [int(layer) for layer in told]
    for name, colour, label in (
        ("whole", "orange", "all positions"), ("closed", "blue", "last position"),
        ("shuffled", "pink", "shuffled labels"), ("random", "grey", "random, same norm"),
    ):  # fmt: skip
        rows = [np.asarray(row[name], dtype=float) for row in told.values()]
        axis.plot(at, [row.mean() for row in rows], "-o", color=COLOURS[colour], label=label, markersize=4)
        if name in ("shuffled", "random"):
            low, high = ([float(f(row)) for row in rows] for f in (np.min, np.max))
            axis.fill_between(at, low, high, color=COLOURS[colour], alpha=0.2, linewidth=0)
    axis.axhline(1, color="#222222", linestyle=":", linewidth=1)
    axis.set(title="Sentiment, by layer", xlabel="added after block", ylabel="share of the gap closed")
    axis.legend(fontsize=8)


def _alphas(axis: Axes, outcome: Outcome) -> None:
    given = [*outcome.size["alphas"], 1.0]
    for layer, colour in ((22, "sky"), (26, "blue")):
        told = outcome.details["layers"][str(layer)]
        values = [*np.mean(told["alphas"], axis=0), np.mean(told["closed"])]
        order = np.argsort(given)
        axis.plot(np.array(given)[order], np.array(values)[order], "-o", color=COLOURS[colour],
                  label=f"layer {layer}", markersize=4)  # fmt: skip
    axis.axhline(1, color="#222222", linestyle=":", linewidth=1)
    axis.set(title="Sentiment, by alpha", xlabel="alpha", ylabel="share of the gap closed")
    axis.legend(fontsize=8)


def _explained(axis: Axes, outcome: Outcome) -> None:
    kinds = {"scene": "by scene", "drawn": "drawn", "none": "no colours"}
    names = {"other": "pink", "common": "sky", "shifted": "blue"}
    for place, (how, colour) in enumerate(names.items()):
        means, reach = intervals(outcome, [f"{kind}_explained_{how}" for kind in kinds])
        at = np.arange(len(kinds)) + 0.27 * (place - 1)
        axis.bar(at, means, 0.25, yerr=reach, color=COLOURS[colour], label=LABELS[how], ecolor="#222222")
    axis.set_xticks(range(len(kinds)), kinds.values())
    axis.axhline(0, color="#222222", linewidth=0.8)
    axis.set(title="Held-out shift explained, layer 27", ylabel="share")
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3)


def _bars(axis: Axes, outcome: Outcome, what: str, title: str, label: str, names: tuple[str, ...]) -> None:
    means, reach = intervals(outcome, [f"{what}_{name}" for name in names])
    told = [LABELS.get(name, name) for name in names]
    axis.bar(range(len(names)), means, 0.6, yerr=reach, color=[SHADES[n] for n in names], ecolor="#222222")
    axis.set_xticks(range(len(names)), told, fontsize=8.5)
    axis.set(title=f"{title}, shift added at layer 27", ylabel=label)
