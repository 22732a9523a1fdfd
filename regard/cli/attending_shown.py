"""How a classifier of texts bears perturbed attention, and what its attention is like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from regard.errors import RegardError

if TYPE_CHECKING:
    from regard.tasks.text_files import LabelledTexts

MOST, BATCH = 200, 32
MEASURES = {
    "correlation": "correlation with gradient importance (Pearson)",
    "entropy": "entropy of attention, nats",
    "mass": "attention on the words that matter",
    "auprc": "average precision at finding them",
    "iou_f1": "F1 of spans (IoU)",
}


def parse_lengths(given: str | None) -> tuple[float, ...]:
    """Return the lengths of a list such as `0,1,5`.

    Raises:
        RegardError: where it is no such list.
    """
    from regard.objectives.adversarial.attack import CURVE

    if given is None:
        return CURVE
    try:
        found = tuple(float(part) for part in given.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 <= size < float("inf") for size in found):
        raise RegardError(f"--eps takes lengths from 0, such as 0,1,5, and got {given!r}.")
    return found


def judged(
    model: Any, tokenizer: Any, data: LabelledTexts, *, eps: Sequence[float], words: frozenset[str],
    longest: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Return how a classifier bears attacks on 200 held-out texts at most, and what its attention is like."""
    from regard.objectives.adversarial import reach
    from regard.objectives.adversarial.attack import robustness_curve
    from regard.objectives.adversarial.evidence import evidence_of
    from regard.objectives.adversarial.measures import measure_attention
    from regard.objectives.schedule import device_of
    from regard.objectives.texts import coded
    from regard.runtime.table import finite

    port, device = reach(model.eval()), device_of(model)
    chosen = data.held_out[:MOST]
    batches = [
        {name: x.to(device) for name, x in batch.items()}
        for batch in coded(tokenizer, chosen, BATCH, longest)
    ]
    texts = [text for text, _ in chosen]
    spans = {text: data.evidence[text] for text in texts if text in data.evidence}
    evidence = None
    if words or spans:
        evidence = evidence_of(tokenizer, texts, words=words, spans=spans, batch=BATCH, longest=longest)
    curve = robustness_curve(port, batches, eps, seed=seed)
    found = measure_attention(port, batches, evidence)
    return {
        "texts": len(chosen),
        "robustness": [dict(row) for row in curve.rows()],
        "attention": {
            name: {key: finite(value) for key, value in found.mean(name)._asdict().items()}
            for name in found.values
        },
    }


def lines_of(told: Mapping[str, Any]) -> list[str]:
    """Return what `judged` found, in lines."""
    lines = [f"  eps  attacked  at random   ({told['texts']} held-out texts, accuracy)"]
    lines += [
        f"{row['eps']:5g} {row['accuracy']:9.1%} {row['random_accuracy']:10.1%}" for row in told["robustness"]
    ]
    return [*lines, *(_line(name, mean) for name, mean in told["attention"].items())]


def _line(name: str, mean: Mapping[str, Any]) -> str:
    if mean["value"] is None:
        return f"{MEASURES[name]}: not defined on these texts"
    ends = "" if mean["low"] is None else f" [{mean['low']:.3f}, {mean['high']:.3f}]"
    return f"{MEASURES[name]}: {mean['value']:.3f}{ends}"
