"""Patterns in few bytes come back as they were, to the stated accuracy."""

import base64
import zlib

import numpy as np
import pytest
import torch

from regard.lens.grid import Grid
from regard.report import pack
from regard.report.recorder import Recorded


def unpacked(packed):
    return np.frombuffer(
        zlib.decompress(base64.b64decode(packed.data)), np.int8 if packed.signed else np.uint8
    )


def recorded(heads=3, rows=30, keys=30, exact=True, seed=0, site="text.0"):
    weights = torch.rand(heads, rows, keys, generator=torch.Generator().manual_seed(seed)) ** 6
    weights = weights.tril() / weights.tril().sum(-1, keepdim=True)
    grid = Grid(1, heads, 8, torch.device("cpu"))
    kept = Recorded(site, list(range(rows)), list(range(keys)), (rows, keys), grid)
    kept.grid.add(0, weights, 0, 0)
    best = weights.topk(min(8, keys), -1)
    if exact:
        kept.exact = weights.half()
    else:
        kept.top_keys, kept.top_weights = best.indices.int(), best.values.half()
    return kept, weights


@pytest.mark.parametrize("largest", [1.0, 7.5])
def test_weights_come_back(largest):
    weights = (np.random.default_rng(0).random((40, 50)) ** 4 * largest).astype(np.float32)
    codes, scale, signed = pack.quantised(weights)
    assert not signed and (scale == 1.0 if largest == 1.0 else scale == pytest.approx(weights.max()))
    error = np.abs(pack.opened(codes, scale, signed) - weights)
    assert (error <= scale * (np.sqrt(weights / scale) / 255 + 5e-6)).all()


def test_negative_weights_keep_their_sign():
    weights = np.random.default_rng(0).normal(size=(20, 20)).astype(np.float32)
    codes, scale, signed = pack.quantised(weights)
    assert signed and codes.dtype == np.int8
    found = pack.opened(codes, scale, signed)
    assert (np.sign(found[np.abs(weights) > 0.01]) == np.sign(weights[np.abs(weights) > 0.01])).all()
    assert np.abs(found - weights).max() <= scale * (1 / 127 + 2e-5)


def test_all_weights_of_a_head():
    kept, weights = recorded()
    packed = pack.exact(kept, 1)
    found = pack.opened(unpacked(packed).reshape(packed.shape), packed.scale, packed.signed)
    assert np.abs(found - weights[1].numpy()).max() < 0.004


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("keys", [30, 70_000])
def test_the_strongest_keys(exact, keys):
    kept, weights = recorded(heads=2, rows=4, keys=keys, exact=exact)
    packed = pack.top(kept, 1, 3)
    planes = unpacked(packed).view(np.uint8).reshape(3, packed.key_bytes + 1, 4).astype(int)
    places = sum(planes[:, b] << 8 * b for b in range(packed.key_bytes))
    assert packed.key_bytes == (3 if keys > 1 << 16 else 2)
    for row in range(1, 4):
        best = weights[1, row].topk(2)
        assert places[0, row] == best.indices[0] and places[1, row] == best.indices[1]
        found = pack.opened(planes[:2, -1, row].astype(np.uint8), 1.0, False)
        assert np.abs(found - best.values.numpy()).max() < 0.004


def test_what_fits_is_kept_and_the_named_come_first():
    kept = [recorded(seed=s, site=f"text.{s}", rows=60, keys=60)[0] for s in range(3)]
    everything = pack.within(kept, [("text.2", 1)], 10**9, 1)
    kinds = {(p.site, p.head): (p.kind, p.k) for p in everything}
    assert kinds["text.2", 1] == ("exact", 0)
    assert kinds["text.0", 0] == ("top", 8)
    assert len(kinds) == 3 + 9
    size = sum(len(p.data) for p in everything)
    for budget in (size // 2, size // 4):
        less = pack.within(kept, [("text.2", 1)], budget, 1)
        assert sum(len(p.data) for p in less) <= max(budget, sum(len(p.data) for p in less if p.head is None))
    named = pack.named_only(kept, [("text.1", 0), ("text.9", 0)], 10**9)
    assert [(p.site, p.head, p.kind) for p in named] == [("text.1", 0, "exact")]


def test_what_is_not_finite_counts_as_nothing():
    codes, scale, _ = pack.quantised(np.array([[np.nan, np.inf, 0.5]], dtype=np.float32))
    assert scale == 1.0 and codes.tolist() == [[0, 0, 180]]
