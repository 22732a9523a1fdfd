"""Induction scores against their definition."""

import numpy as np
import torch

import regard
from regard.lens import Induction, matches
from tests.lens.dense import matched, over_rows
from tests.lens.plant import HEAD, SITE, found_and_control


def test_equals_the_dense_computation(watched):
    see, dense, ids = watched
    result = see(Induction())
    for alias, parts in dense.items():
        rows = np.array(result.sites) == alias
        found = [matched(a, x, 1) for a, x in zip(parts, ids, strict=True)]
        np.testing.assert_allclose(
            result["score"][rows], over_rows([(m, k) for m, k, _ in found]), rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(
            result["chance"][rows], over_rows([(c, k) for _, k, c in found]), rtol=1e-5
        )


def test_few_and_many_pairs_give_the_same(watched, monkeypatch):
    see, _, _ = watched
    monkeypatch.setattr(matches, "DENSE", 2.0)
    sparse = see(Induction())
    monkeypatch.setattr(matches, "DENSE", -1.0)
    dense = see(Induction())
    np.testing.assert_allclose(sparse["score"], dense["score"], rtol=1e-5, atol=1e-6)


def test_finds_a_planted_head_and_not_elsewhere(llama):
    ids = torch.randperm(30)[:12].add(5).repeat(2)[None]
    found, control = found_and_control(llama, ids, Induction(), lambda i: i - 11 if i >= 12 else None)
    assert found.top("score", 1) == [(SITE, HEAD, 1.0)]
    assert control.at(SITE, HEAD)["score"] < 0.5
    other, _ = found_and_control(llama, ids, Induction(), lambda i: i - 12 if i >= 12 else None)
    assert other.at(SITE, HEAD)["score"] == 0.0


def test_pairs_are_found_once_for_all_layers(llama, monkeypatch):
    calls = []
    real = matches._find
    monkeypatch.setattr(matches, "_find", lambda *a: calls.append(a) or real(*a))
    with torch.no_grad(), regard.watch(llama, Induction()):
        llama(input_ids=torch.arange(5, 15).repeat(2)[None])
    assert len(calls) == 1
