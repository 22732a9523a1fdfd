"""What a routed mechanism looked at and missed, against the dense computation."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

import regard
from regard.attention import HiP, LandmarkMemory, SlidingWindow
from regard.attention.select import oracle_scores, top_mask
from regard.errors import RegardError
from regard.lens import Routed
from regard.runtime.protocol import Edit, Lens
from tests.lens.dense import assert_same
from tests.support.families import FAMILIES

HIP = HiP(k=4, query_block=4, window=4, sink=2, refresh=1, dense_layers=0)
BY_ROW = HiP(k=4, query_block=1, query_stride=1, window=4, sink=2, refresh=1, dense_layers=1)
MEMORY = LandmarkMemory(block=4, top_k=2, positions="true")
SPECS = [HIP, SlidingWindow(5), MEMORY]
TOP = 3


def texts(padding, length=30):
    ids = torch.randint(5, 90, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[0, slice(0, 9) if padding == "left" else slice(length - 9, length)] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"].build("sdpa")


@dataclass(frozen=True, kw_only=True, eq=False)
class Calls(Lens):
    """Keeps the queries and keys of every call."""

    kept: dict = field(default_factory=dict)

    def end_call(self, call):
        self.kept[call.site.alias] = call.q.double(), call.k.double()

    def result(self):
        return self.kept


def by_row(weights, chosen, top):
    """All measures of rows [H, n], one row and head at a time; a key sees itself and those before it."""
    heads, length = weights.shape[:2]
    found = {name: torch.zeros(heads, length) for name in ("kept", "recall", "read", "nearest", "oracle")}
    for h in range(heads):
        for i in range(length):
            a, read = weights[h, i, : i + 1], chosen[h, i, : i + 1]
            count = int(read.sum())
            heaviest = a.argsort(descending=True)
            found["kept"][h, i] = a[read].sum()
            found["recall"][h, i] = read[heaviest[:top]].double().mean()
            found["read"][h, i] = count / (i + 1)
            found["nearest"][h, i] = a[i + 1 - count :].sum()
            found["oracle"][h, i] = a[heaviest[:count]].sum()
    return found


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.registered)
def test_equals_the_dense_computation(llama, spec, padding):
    inputs = texts(padding)
    with torch.no_grad(), regard.swap(llama, spec), regard.watch(llama, Routed(top=TOP), Calls()) as seen:
        llama(**inputs, use_cache=False)
    result, mechanism = seen[Routed], spec.build()
    for alias, (q, k) in seen[Calls].items():
        rows, covered = [], []
        for one in range(2):
            real = inputs["attention_mask"][one].bool()
            x, y = q[one : one + 1, :, real], k[one : one + 1, :, real]
            chosen = mechanism.matrix(x, y)[0] > 0
            y = y.repeat_interleave(x.shape[1] // y.shape[1], 1)
            scores = (x @ y.transpose(2, 3))[0] * x.shape[3] ** -0.5
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
            rows.append(by_row(scores.masked_fill(hidden, -torch.inf).softmax(-1), chosen, TOP))
            covered.append(chosen.any(1).double().mean(-1))
        for name in rows[0]:
            expected = torch.cat([part[name] for part in rows], 1).mean(1)
            found = [result.at(alias, h)[name] for h in range(len(expected))]
            np.testing.assert_allclose(found, expected, atol=2e-5, err_msg=name)
        found = [result.at(alias, h)["coverage"] for h in range(q.shape[1])]
        np.testing.assert_allclose(found, torch.stack(covered).mean(0), atol=1e-6)


def test_what_reads_all_misses_nothing(llama):
    for session in (regard.swap(llama, SlidingWindow(99)), regard.watch(llama)):
        with torch.no_grad(), session, regard.watch(llama, Routed()) as seen:
            llama(**texts("left"))
        table = seen[Routed]
        assert all(np.allclose(table[name], 1, atol=1e-6) for name in table.columns)
        assert Routed.findings(table) == ()


def test_a_window_is_its_nearest_keys_and_its_finding_says_what_they_hold(llama):
    with torch.no_grad(), regard.swap(llama, SlidingWindow(4)), regard.watch(llama, Routed()) as seen:
        llama(**texts("none"))
    table = seen[Routed]
    np.testing.assert_allclose(table["kept"], table["nearest"], atol=1e-6)
    assert (table["oracle"] > table["kept"] + 0.01).all() and (table["read"] < 0.5).all()
    (finding,) = Routed.findings(table)
    worst = table.top("kept", 1, largest=False)[0]
    assert finding.heads == (worst[:2],) and f"which hold {worst[2]:.0%}, and as many" in finding.text


@dataclass(frozen=True, kw_only=True, eq=False)
class Heaviest(Edit):
    """Says that it reads the keys of the largest weights, as an oracle would; reads all."""

    count: int

    def looked_at(self, call):
        k = call.k.repeat_interleave(call.heads // call.kv_heads, 1)
        scores = call.q @ k.transpose(2, 3) * call.scale
        hidden = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        chosen = top_mask(oracle_scores(weights), self.count, ~hidden)
        return lambda start, stop: chosen[:, :, start:stop]

    def attend(self, call, inner):
        return inner(call)


def test_a_choice_of_the_heaviest_is_the_oracle(llama):
    with torch.no_grad(), regard.steer(llama, Heaviest(count=6)), regard.watch(llama, Routed(top=6)) as seen:
        llama(**texts("none"))
    table = seen[Routed]
    np.testing.assert_allclose(table["kept"], table["oracle"], atol=1e-6)
    np.testing.assert_allclose(table["recall"], 1, atol=1e-6)
    assert (table["nearest"] < table["kept"]).all()


@pytest.mark.parametrize("padding", ["none", "left"])
def test_generating_equals_one_forward_and_a_batch_its_sequences(llama, padding):
    inputs = texts(padding)
    with torch.no_grad(), regard.swap(llama, BY_ROW), regard.watch(llama, Routed()) as seen:
        ids = llama.generate(**inputs, max_new_tokens=6, do_sample=False)[:, :-1]
    more = torch.ones(2, ids.shape[1] - inputs["input_ids"].shape[1], dtype=torch.int64)
    mask = torch.cat([inputs["attention_mask"], more], 1)
    with torch.no_grad(), regard.swap(llama, BY_ROW), regard.watch(llama, Routed()) as whole:
        llama(input_ids=ids, attention_mask=mask)
    with torch.no_grad(), regard.swap(llama, BY_ROW), regard.watch(llama, Routed()) as apart:
        for row, real in zip(ids, mask.bool(), strict=True):
            llama(input_ids=row[real][None])
    assert_same(seen[Routed], whole[Routed], 1e-4)
    assert_same(whole[Routed], apart[Routed], 1e-4)
    assert (whole[Routed]["read"] < 1).any() and whole[Routed].at("text.0", 0)["kept"] == 1


def test_steps_that_decode_from_a_state_are_left_out(llama):
    inputs = texts("none")
    with torch.no_grad(), regard.swap(llama, MEMORY), regard.watch(llama, Routed()) as seen:
        llama.generate(**inputs, max_new_tokens=4, do_sample=False)
    with torch.no_grad(), regard.swap(llama, MEMORY), regard.watch(llama, Routed()) as prompt:
        llama(**inputs)
    assert_same(seen[Routed], prompt[Routed])


@pytest.mark.parametrize("top", [0, True, 2.5])
def test_a_wrong_number_of_keys_is_refused(top):
    with pytest.raises(RegardError, match="top is .*; it must be a number of keys, from 1"):
        Routed(top=top)
