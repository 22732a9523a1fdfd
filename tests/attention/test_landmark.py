"""Landmark attention: the grouped softmax against its formula, tokens, positions and refusals."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch

import regard.attention.landmark.fast as fast
import regard.attention.landmark.read as read
from regard.attention import Context, Landmark, LandmarkMemory, MultiHeadAttention, landmark_attention
from regard.attention.landmark import (
    grouped_softmax,
    insert_landmarks,
    jumped_positions,
    landmark_gates,
    remove_landmarks,
)
from regard.attention.landmark.fast import Regular, attend_regular
from regard.attention.landmark.turns import Turns
from regard.attention.positions import Rotary
from regard.errors import RegardError, ShapeMismatch
from tests.laws.laws import near


def by_formula(scores, marks):
    """The weights [T, T] of one head, number by number."""
    length = len(marks)
    block = [sum(marks[:j]) for j in range(length)]
    weights = torch.zeros(length, length, dtype=torch.float64)
    for i in range(length):
        current = [j for j in range(i + 1) if block[j] == block[i] and not marks[j]]
        gates = [j for j in range(i) if block[j] < block[i] and marks[j]]
        gates = [g for g in gates if any(block[j] == block[g] and not marks[j] for j in range(g))]
        whole = sum(math.exp(scores[i, j]) for j in current + gates)
        for j in current:
            weights[i, j] = math.exp(scores[i, j]) / whole
        for g in gates:
            inside = [j for j in range(g) if block[j] == block[g] and not marks[j]]
            total = sum(math.exp(scores[i, j]) for j in inside)
            for j in inside:
                weights[i, j] = math.exp(scores[i, g]) / whole * math.exp(scores[i, j]) / total
    return weights


@pytest.mark.parametrize("seed", range(4))
def test_any_placement_is_the_formula(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(1, 2, 17, 17, generator=generator, dtype=torch.float64)
    marks = torch.rand(1, 17, generator=generator) < 0.3
    weights, gates = grouped_softmax(scores, marks, torch.ones(1, dtype=torch.bool))
    for head in range(2):
        near(weights[0, head], by_formula(scores[0, head].tolist() and scores[0, head], marks[0].tolist()))
    held = [weights[..., marks.cumsum(-1)[0] - marks[0].long() == b].sum(-1) for b in range(int(marks.sum()))]
    own = (marks.cumsum(-1) - marks.long())[0]
    for number, share in enumerate(held):
        near(gates[..., number], share * (own > number))


def test_rows_sum_to_one_and_a_landmark_does_not_see_itself():
    q, k = torch.randn(2, 1, 2, 24, 8, dtype=torch.float64)
    weights = Landmark(6).build().matrix(q[None, 0], k[None, 0])
    near(weights.sum(-1), torch.ones(1, 2, 24, dtype=torch.float64))
    assert not weights[..., 5::6].any(), "a landmark was read"


def test_regular_landmarks_take_the_fast_path_and_agree_with_the_definition():
    q, k, v = torch.randn(3, 2, 4, 30, 8, dtype=torch.float64)
    marks = torch.arange(30) % 7 == 6
    expected = landmark_attention(q, k, v, marks, impl="matrix")
    near(landmark_attention(q, k, v, marks), expected)
    near(landmark_attention(q[:, :, 20:], k, v, marks), expected[:, :, 20:])
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    near(landmark_attention(q, k, v, torch.zeros(30, dtype=torch.bool)), plain)
    gates = landmark_gates(q, k, marks)
    assert gates.shape == (2, 4, 30, 4) and not gates[:, :, :7].any() and (gates[:, :, 28:] > 0).all()


def test_gradients_of_the_fast_path(monkeypatch):
    monkeypatch.setitem(fast.NUMBERS, "cpu", 1)  # pieces of 16 rows
    given = [torch.randn(1, n, 18, 3, dtype=torch.float64, requires_grad=True) for n in (2, 1, 1)]
    assert torch.autograd.gradcheck(lambda *x: attend_regular(*x, Regular(4, 0, 0.7)), given)
    late = [given[0][:, :, 11:].detach().requires_grad_(), *given[1:]]
    assert torch.autograd.gradcheck(lambda *x: attend_regular(*x, Regular(5, 11, 0.7)), late)


def test_scores_that_are_huge_or_far_apart_stay_finite():
    q, k, v = (
        (100 * torch.randn(1, 1, 20, 4)).requires_grad_(),
        torch.randn(1, 1, 20, 4),
        torch.randn(1, 1, 20, 4),
    )
    out = landmark_attention(q, k, v, torch.arange(20) % 5 == 4)
    out.sum().backward()
    assert out.isfinite().all() and q.grad.isfinite().all()
    near(out, landmark_attention(q, k, v, torch.arange(20) % 5 == 4, impl="matrix"), 1e-5)


def test_insert_and_remove_are_inverse_and_labels_pass_over_landmarks():
    ids = torch.arange(1, 15).view(2, 7)
    text = insert_landmarks(ids, 3, 99, labels=ids)
    assert text.ids[0].tolist() == [1, 2, 3, 99, 4, 5, 6, 99, 7]
    assert text.labels[0].tolist() == [1, 2, 3, 4, -100, 5, 6, 7, -100]
    assert torch.equal(remove_landmarks(text.ids, text.is_landmark), ids)
    kept = insert_landmarks(ids, 3, 99, labels=ids, predict=True).labels[0]
    assert kept.tolist() == text.ids[0].tolist()


@pytest.mark.parametrize("left", [True, False])
def test_padding_is_not_counted(left):
    row, pad = [1, 2, 3, 4], [0, 0, 0]
    ids = torch.tensor([pad + row if left else row + pad, [1, 2, 3, 4, 5, 6, 7]])
    text = insert_landmarks(ids, 2, 9, mask=ids > 0, pad=0)
    assert text.ids[0][text.mask[0]].tolist() == [1, 2, 9, 3, 4, 9]
    assert bool(text.mask[0, 0]) is not left and text.ids.shape == (2, 10)


def test_positions_jump_after_landmarks_alone():
    marks = (torch.arange(40) % 8 == 7)[None]
    at = jumped_positions(marks, 5, torch.Generator().manual_seed(0))
    steps = at.diff()[0]
    assert (steps[~marks[0, :-1]] == 1).all() and (steps[marks[0, :-1]] > 1).any() and steps.max() <= 6


def test_a_turn_is_rotary_embedding_and_can_be_given_back():
    x, at = torch.randn(1, 2, 9, 8, dtype=torch.float64), torch.arange(9) + 40_000
    turned = Rotary()(x, at[None])
    near(Turns(10000.0)(x, at * 0, at), turned, 1e-8)
    near(Turns(10000.0)(turned, at, at - 40_000), Rotary()(x, at[None] - 40_000), 1e-8)
    single = Rotary()(x.float(), at[None])
    back = Turns(10000.0)(single, at, at * 0)
    near(back, x, 1e-5)  # the angles of float32 were rounded by 1e-3


def test_a_memory_that_reads_all_is_the_grouped_softmax():
    q, k, v = torch.randn(3, 1, 2, 40, 8)
    whole = Landmark(4).build()(q, k, v)
    found = LandmarkMemory(block=4, top_k=9, local=8, positions="true").build()(q, k, v)
    near(found, whole, 1e-5)
    few = LandmarkMemory(block=4, top_k=1, local=8, positions="true").build()(q, k, v)
    near(few[:, :, :8], whole[:, :, :8], 1e-5)
    assert (few - whole)[:, :, 24:].abs().max() > 0.01


def test_recent_blocks_keep_their_distance_and_far_ones_do_not():
    layer = {"rotary": 10000.0, "block": 4, "top_k": 2}
    q, k, v = torch.randn(3, 1, 1, 12, 8, dtype=torch.float64)
    at = torch.arange(12)[None]
    q, k = Rotary()(q, at), Rotary()(k, at)
    true = LandmarkMemory(block=4, top_k=2, positions="true").build()(q, k, v)
    near(LandmarkMemory(**layer).build()(q, k, v), true, 1e-8)  # no more than k blocks: nothing moved
    later = Rotary()(torch.randn(1, 1, 40, 8, dtype=torch.float64), torch.arange(40)[None])
    out = LandmarkMemory(**layer).build()(later, later, later)
    far = LandmarkMemory(**layer | {"positions": "true"}).build()(later, later, later)
    assert (out - far)[:, :, 12:].abs().max() > 1e-3


def test_distances_are_those_of_the_official_positions():
    reader = LandmarkMemory(block=4, top_k=3, positions="true").build().reader(1.0)
    chosen = torch.tensor([0, 2, 6]).view(1, 1, 1, 3)
    assert reader.distances(chosen, 8).flatten().tolist() == [4, 3, 1]  # slots 0, 1, 2 + 1 of 4
    assert reader.distances(torch.tensor([5, 6, 7]).view(1, 1, 1, 3), 8).flatten().tolist() == [3, 2, 1]


def test_memory_is_bounded_and_first_in_is_first_out():
    spec = LandmarkMemory(block=3, top_k=1, memory=2, positions="true")
    q, k, v = torch.randn(3, 1, 1, 31, 4, dtype=torch.float64)
    _, state = spec.build().step(q, k, v, None)
    assert state[2].shape[2] == 2 and state[4].shape[2] == 1
    near(state[2].flatten(2, 3), k[:, :, 24:30])
    changed = torch.cat([5 * k[:, :, :20], k[:, :, 20:]], 2)
    late = [m.build()(q, x, v)[:, :, 27:] for m in (spec,) for x in (k, changed)]
    near(late[0], late[1])


def test_blocks_are_chosen_by_what_they_are_chosen_by():
    q, k, v = torch.randn(3, 1, 2, 60, 4, dtype=torch.float64)
    outs = {
        c: LandmarkMemory(block=3, top_k=2, positions="true", choose=c).build()(q, k, v)
        for c in ("landmark", "mean", "recent", "random")
    }
    names = list(outs)
    for one, other in pairwise(names):
        assert (outs[one] - outs[other]).abs().max() > 1e-3
    shared = LandmarkMemory(block=3, top_k=2, positions="true", share_heads=True).build()(q, k, v)
    assert (shared - outs["landmark"]).abs().max() > 1e-3


def test_landmark_layers_decode_as_they_run():
    for mechanism in (Landmark(3), LandmarkMemory(block=3, top_k=2)):
        layer = MultiHeadAttention(16, 2, mechanism=mechanism, positions="rotary").double()
        x, state, outs = torch.randn(2, 23, 16, dtype=torch.float64), None, []
        whole = layer(x)
        for i in range(23):
            out, state = layer.step(x[:, i : i + 1], state)
            outs.append(out)
        near(torch.cat(outs, 1), whole, 1e-7)


def test_dropout_acts_on_the_final_weights():
    q, k = torch.randn(2, 1, 1, 9, 4)
    ctx = Context.of(q, k)
    torch.manual_seed(3)
    found = Landmark(3).build()(q, k, torch.eye(9)[None, None], dataclasses.replace(ctx, dropout=0.5))
    weights = Landmark(3).build().matrix(q, k)
    assert ((found - 2 * weights).abs() < 1e-5).logical_or(found == 0).all() and (found == 0).sum() > 40


def test_all_ways_to_read_blocks_agree():
    q, keys, values = torch.randn(2, 4, 9, 3, 8), torch.randn(2, 2, 6, 5, 8), torch.randn(2, 2, 6, 5, 7)
    far, chosen = read.Far(keys[:, :, :, -1], keys, values), torch.randint(6, (2, 4, 9, 3))
    expected = read._fetched(q, chosen, far)
    for way in (read._sorted, read._listed):
        for found, wanted in zip(way(q, chosen, far), expected, strict=True):
            near(found, wanted, 1e-5)


Q, NONE = torch.zeros(1, 1, 6, 4), torch.zeros(6, dtype=torch.bool)
BESIDE = torch.tensor([0, 0, 0, 1, 1, 0]).bool()
REFUSED = {
    "not causal": (lambda: landmark_attention(Q, Q, Q, NONE, causal=False), "causal"),
    "marks of another length": (lambda: landmark_attention(Q, Q, Q, NONE[:5]), "bool"),
    "marks that are no bool": (lambda: landmark_attention(Q, Q, Q, torch.zeros(6)), "float32"),
    "nan": (lambda: landmark_attention(Q * torch.nan, Q, Q, NONE), "NaN"),
    "blocks of irregular": (
        lambda: landmark_attention(Q, Q, Q, BESIDE, impl="blocks"), "every L-th",
    ),
    "a block of one": (lambda: Landmark(1), "from 2"),
    "top_k below 0": (lambda: LandmarkMemory(top_k=-1), "top_k is -1"),
    "an uneven section": (lambda: LandmarkMemory(block=8, local=12), "multiple of block"),
    "too long a section": (
        lambda: LandmarkMemory(block=64, top_k=5, local=256, longest=512), "take 640 positions",
    ),
    "positions unknown": (lambda: LandmarkMemory(positions="stingy"), "remapped, true"),
    "no rotary base": (lambda: LandmarkMemory().build(), "rotary="),
    "no such device": (lambda: LandmarkMemory(offload="moon"), "device"),
    "landmarks twice": (lambda: insert_landmarks(torch.tensor([[1, 9]]), 2, 9), "already"),
    "every 0": (lambda: insert_landmarks(torch.tensor([[1, 2]]), 0, 9), "every is 0"),
    "padding in the middle": (
        lambda: insert_landmarks(torch.ones(1, 4).long(), 2, 9, mask=torch.tensor([[1, 0, 1, 1]])),
        "one end",
    ),
    "ragged landmarks": (
        lambda: remove_landmarks(torch.ones(2, 2), torch.tensor([[True, False], [False, False]])),
        "row by row",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    call, words = REFUSED[name]
    with pytest.raises((RegardError, ShapeMismatch), match=words):
        call()
