"""The lenses' definitions, written out on whole attention matrices of single unpadded sequences."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard.lens.column_mass import ColumnMassResult
from regard.lens.outliers import OutlierReport
from regard.lens.patterns import KeptPatterns
from regard.lens.residual_norm import ResidualNorms
from regard.runtime.head_table import HeadTable


def attentions(model: Any, inputs: dict[str, Any]) -> dict[str, list[Tensor]]:
    """Return alias -> for each sequence its attention [H, t, t] without padding, float64, by eager."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation(before)
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    return {
        f"text.{layer}": [a[:, real][:, :, real].double() for a, real in zip(weights, mask, strict=True)]
        for layer, weights in enumerate(found)
    }


def sequences(inputs: dict[str, Any]) -> list[Tensor]:
    """Return the real tokens of each sequence."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    return [ids[real] for ids, real in zip(inputs["input_ids"], mask, strict=True)]


def over_rows(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the mean of values [H, t] over the rows where bool [t] is True, all sequences together."""
    total = sum((values * keep).sum(-1) for values, keep in parts)
    return total / sum(keep.sum() for _, keep in parts)


def entropy(a: Tensor) -> Tensor:
    return -(a * torch.where(a > 0, a, 1.0).log()).sum(-1)


def distance(a: Tensor) -> Tensor:
    i = torch.arange(a.shape[1], dtype=a.dtype)
    return (a * (i[:, None] - i).abs()).sum(-1)


def matched(a: Tensor, ids: Tensor, shift: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return per row the mass on keys `shift` after equal tokens, whether there is one, and their share."""
    length = len(ids)
    pairs = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        for j in range(shift, i):
            pairs[i, j] = ids[j - shift] == ids[i] and bool((a[:, i, j] > 0).any())
    share = pairs.sum(1) / (a > 0).any(0).sum(1)
    return (a * pairs).sum(-1), pairs.any(1), share.double().expand(len(a), -1)


def alphas(a: Tensor) -> Tensor:
    """Return the mean attention each key receives from the rows that see it, [H, t]."""
    return a.sum(1) / (a > 0).any(0).sum(0)


def numbers(result: Any) -> dict[str, np.ndarray]:
    """Return every number of a result by name."""
    if isinstance(result, HeadTable):
        return {name: np.asarray(result[name]) for name in result.columns}
    if isinstance(result, ColumnMassResult):
        return {**numbers(result.heads), **result.mass}
    if isinstance(result, ResidualNorms | OutlierReport):
        told = {"block", "tensor"}
        return {n: np.array(v) for n, v in result.table.columns.items() if n not in told}
    assert isinstance(result, KeptPatterns)
    found = {}
    for alias, patterns in result.kept.items():
        for i, p in enumerate(patterns):
            found[f"{alias}|{i}|weights"], found[f"{alias}|{i}|peaks"] = p.weights.numpy(), p.peaks.numpy()
            if p.tokens is not None:
                found[f"{alias}|{i}|tokens"] = p.tokens.numpy()
    return found


def assert_same(one: Any, other: Any, tolerance: float = 1e-5) -> None:
    """Compare two results, number by number."""
    first, second = numbers(one), numbers(other)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=tolerance, atol=tolerance, err_msg=name)
