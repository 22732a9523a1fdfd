"""What the attention of a classifier is like: sharp, in line with gradients, on the words that matter.

    importance_t = || d logit_c / d e_t ||_2        c the predicted class, e_t the embedding of token t
    correlation  = Pearson of attention and importance over the tokens of a text
    entropy      = -sum_t alpha_t ln alpha_t
    mass         = sum of alpha_t over the tokens that matter
    auprc        = average precision of alpha at finding these
    iou_f1       = F1 of spans: the k heaviest tokens, k as many as matter; runs of them are spans, and a span
                   is found where another shares half of their union

Source: correlation as in Kitada and Iyatomi, 2020, arXiv 2009.12064 (after Jain and Wallace, 2019, arXiv
1902.10186); auprc and iou_f1 as in ERASER (DeYoung et al., 2019, arXiv 1911.03429). Status: partly our choice
(the norm of the gradient, k).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from regard.errors import RegardError, ShapeMismatch
from regard.lens.explanations.pairs import interval_of
from regard.objectives.adversarial.reach import Reach
from regard.runtime.table import Table

FEWEST = 3
NAMES = ("correlation", "entropy", "mass", "auprc", "iou_f1")


class Mean(NamedTuple):
    """A mean over texts, its 95 % interval, and how many texts define the number."""

    value: float
    low: float
    high: float
    texts: int


@dataclass(frozen=True)
class AttentionMeasures:
    """Numbers of every text, float32 [N], NaN where not defined.

    Attributes:
        values: name of `NAMES` -> numbers.
    """

    values: Mapping[str, Tensor]

    def mean(self, name: str) -> Mean:
        """Return the mean over the texts that define a number."""
        kept = self.values[name].double().numpy()
        kept = kept[np.isfinite(kept)]
        if not len(kept):
            return Mean(float("nan"), float("nan"), float("nan"), 0)
        return Mean(float(kept.mean()), *interval_of(kept), len(kept))

    @property
    def table(self) -> Table:
        """One row a measure."""
        means = {name: self.mean(name) for name in self.values}
        columns = {field: [getattr(m, field) for m in means.values()] for field in Mean._fields}
        return Table({"measure": list(means), **columns}, title="attention, mean over texts")


def measure_attention(
    reach: Reach, batches: Iterable[Mapping[str, Tensor]], evidence: Sequence[Tensor] | None = None
) -> AttentionMeasures:
    """Return what the attention of a classifier is like on texts.

    Args:
        reach: as `reach(model)` gives it, the model in evaluation mode.
        batches: `input_ids` and `attention_mask`, [B, T].
        evidence: the tokens that matter, bool [B, T] a batch; without them the last three
            numbers are left out.

    Raises:
        RegardError: for a model in training mode.
        ShapeMismatch: for evidence of another shape.
    """
    if reach.model.training:
        raise RegardError("the model is in training mode, where dropout hides its attention; call eval().")
    found: dict[str, list[Tensor]] = {}
    for number, batch in enumerate(batches):
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        mask = inputs["attention_mask"].bool()
        with torch.no_grad():
            _, weights = reach.attention(**inputs)
        told = {
            "correlation": pearson(weights, importance(reach, **inputs), mask),
            "entropy": -(weights * weights.clamp_min(1e-30).log()).sum(1),
        }
        if evidence is not None:
            there = evidence[number].to(mask.device)
            if there.shape != mask.shape:
                raise ShapeMismatch(
                    f"evidence is {list(there.shape)}; the batch has {list(mask.shape)} tokens."
                )
            told |= agreement(weights, there.bool() & mask, mask)
        for name, values in told.items():
            found.setdefault(name, []).append(values.cpu())
    if not found:
        raise RegardError("there is no text to measure.")
    return AttentionMeasures({name: torch.cat(parts) for name, parts in found.items()})


def importance(reach: Reach, **inputs: Tensor) -> Tensor:
    """Return the norm of the gradient of the predicted class's logit at each embedding, float32 [B, T]."""
    embed = reach.model.get_input_embeddings()  # type: ignore[operator]
    rest = {name: x for name, x in inputs.items() if name != "input_ids"}
    e = embed(inputs["input_ids"]).detach().requires_grad_()
    with torch.enable_grad():
        logits = reach.model(inputs_embeds=e, **rest).logits.float()
        gradient = torch.autograd.grad(logits.amax(1).sum(), e)[0]
    return gradient.float().norm(dim=-1)


def pearson(x: Tensor, y: Tensor, valid: Tensor) -> Tensor:
    """Return Pearson's correlation of each row over its valid places, float32 [B].

    NaN for fewer than three of them, and where a row is constant.

    Example:
        >>> x = torch.tensor([[1.0, 2, 3, 9]])
        >>> pearson(x, -2 * x, torch.tensor([[True, True, True, False]]))
        tensor([-1.])
    """
    count = valid.sum(1)
    x, y = (_centred(v.double(), valid, count) for v in (x, y))
    top, below = (x * y).sum(1), (x.square().sum(1) * y.square().sum(1)).sqrt()
    defined = (count >= FEWEST) & (below > 1e-18)
    return torch.where(defined, top / below.clamp_min(1e-30), float("nan")).float()


def _centred(values: Tensor, valid: Tensor, count: Tensor) -> Tensor:
    mean = (values * valid).sum(1) / count.clamp_min(1)
    return (values - mean[:, None]) * valid


def agreement(weights: Tensor, evidence: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Return `mass`, `auprc` and `iou_f1` of each text, float32 [B]; NaN where no token matters.

    Args:
        weights: float32 [B, T].
        evidence, valid: bool [B, T].
    """
    some = evidence.any(1)
    order = weights.masked_fill(~valid, -1.0).argsort(dim=1, descending=True, stable=True)
    hits = evidence.gather(1, order).double()
    precision = hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1, device=hits.device)
    spans = torch.tensor([_span_f1(*row) for row in zip(order.cpu(), evidence.cpu(), strict=True)])
    found = {
        "mass": (weights * evidence).sum(1),
        "auprc": (precision * hits).sum(1) / hits.sum(1).clamp_min(1),
        "iou_f1": spans.to(weights.device),
    }
    return {name: torch.where(some, values.float(), float("nan")) for name, values in found.items()}


def _span_f1(order: Tensor, evidence: Tensor) -> float:
    count = int(evidence.sum())
    chosen = torch.zeros_like(evidence)
    chosen[order[:count]] = True
    told, true = _spans(chosen), _spans(evidence)
    if not told or not true:
        return 0.0
    right = sum(any(_shared(a, b) >= 0.5 for b in true) for a in told) / len(told)
    found = sum(any(_shared(a, b) >= 0.5 for b in told) for a in true) / len(true)
    return 2 * right * found / (right + found) if right + found else 0.0


def _spans(mask: Tensor) -> list[tuple[int, int]]:
    """Runs of True, as (start, stop)."""
    edges = torch.diff(torch.cat([mask.new_zeros(1), mask, mask.new_zeros(1)]).int()).nonzero()[:, 0]
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _shared(a: tuple[int, int], b: tuple[int, int]) -> float:
    both = min(a[1], b[1]) - max(a[0], b[0])
    return max(0, both) / (max(a[1], b[1]) - min(a[0], b[0])) if both > 0 else 0.0
