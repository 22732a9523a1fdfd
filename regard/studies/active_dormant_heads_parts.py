"""What the study of active-dormant heads measures of one text, of forced heads and of a small model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard
from regard.edit import ForceAttention
from regard.lens import compare_sinks, measure_sinks
from regard.models.backcopy import BackcopyModel
from regard.objectives.backcopy import train_backcopy
from regard.runtime.head_table import Head
from regard.tasks import bigram_backcopy

STRONG, WIDTH, LENGTH = 0.3, 64, 64


def extremes(model: nn.Module, ids: Tensor) -> dict[str, Any]:
    """Return the sinks, drains and peaks of one text, int64 [T]."""
    found = measure_sinks(model, None, [ids], progress=False)
    table = found.residual.table
    return {
        "sinks": found.sink_rate(STRONG),
        "drain": float(np.nanmedian(found.heads["drain"])),
        "peak": float(np.nanmax(table["peak"])),
        "first": found.heads["first"].tolist(),
        "norms": {name: list(table[name]) for name in ("first", "largest_other")},
    }


def kept(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return, for each two pairs of texts, how many heads differ by over 0.3 and keep the sign."""
    contrasts = [np.array(x["first"]) - np.array(y["first"]) for x, y in zip(a, b, strict=True)]
    return [
        float(((abs(one) > STRONG) & (one * other > 0)).sum())
        for one, other in zip(contrasts[::2], contrasts[1::2], strict=True)
    ]


def rises(
    model: nn.Module,
    texts: Mapping[str, Sequence[Tensor]],
    count: int,
    seed: int,
    tick: Callable[[float], None],
) -> dict[str, list[float]]:
    """Return how the loss rises on the odd texts where heads chosen on the even ones are forced.

    Args:
        texts: domain -> texts, int64 [T]; of `prose` and `code`.
        count: heads forced at once.
    """
    table = compare_sinks(model, None, texts["prose"][::2], texts["code"][::2], length=None, progress=False)
    ends = {"code": table.top("contrast", count), "prose": table.top("contrast", count, largest=False)}
    at_work = {domain: [(site, head) for site, head, _ in rows] for domain, rows in ends.items()}
    chance = {domain: table.matched_random(heads, 1, seed)[0] for domain, heads in at_work.items()}
    odd = [(domain, ids) for domain in texts for ids in texts[domain][1::2]]
    found: dict[str, list[float]] = {"active": [], "dormant": [], "random": []}
    for done, (domain, ids) in enumerate(odd):
        other = "code" if domain == "prose" else "prose"
        plain = loss(model, ids, ())
        for name, heads in (
            ("active", at_work[domain]), ("dormant", at_work[other]), ("random", chance[domain]),
        ):  # fmt: skip
            found[name].append(loss(model, ids, heads) - plain)
        tick((done + 1) / len(odd))
    return found


def loss(model: nn.Module, ids: Tensor, forced: Sequence[Head]) -> float:
    """Return the mean next-token loss of a text, int64 [T], with heads forced onto its first token."""
    steered = regard.steer(model, ForceAttention(forced, to="first")) if forced else nullcontext()
    with torch.no_grad(), steered:
        logits = model(ids[None]).logits[0, :-1]
    return float(F.cross_entropy(logits.float(), ids[1:]))


def trained(
    layers: int, attention: str, optimiser: str, rate: float, batch: int, steps: int, seed: int,
    tick: Callable[[float], None],
) -> dict[str, Any]:  # fmt: skip
    """Train a small model on Bigram-Backcopy, and return what formed inside from step 0 on."""
    torch.manual_seed(seed)
    task = bigram_backcopy(length=LENGTH)
    model = BackcopyModel(task.vocabulary, dim=WIDTH, layers=layers, attention=attention, longest=LENGTH)
    log = train_backcopy(
        model, task, steps=steps, batch=batch, rate=rate, optimiser_name=optimiser, seed=seed,
        evaluate_every=max(1, steps // 20), tick=tick,
    )  # fmt: skip
    rounded = [{name: float(f"{value:.5g}") for name, value in found.items()} for _, found in log.measures]
    return {"steps": [step for step, _ in log.measures], "measures": rounded, "layers": layers}
