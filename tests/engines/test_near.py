"""The ways to take the exponents of a chunk: which is taken where, and that all of them agree."""

import pytest
import torch

from regard.engines import near, pieces
from regard.engines.scan import scan

LENGTH = 150
SHAPES = {"head": (2,), "step": (2, 2, LENGTH), "channel": (2, 2, LENGTH, 5)}
SAFE = {"head": "Weighted", "step": "Weighted", "channel": "Halved"}


@pytest.fixture
def taken(monkeypatch):
    """Names of the ways that were taken, in order."""
    names = []
    for name in ("Factored", "Weighted", "Halved"):
        made = getattr(pieces, name)

        def noted(*given, made=made):
            names.append(made.__name__)
            return made(*given)

        monkeypatch.setattr(pieces, name, noted)
    return names


def draw(kind, strength, dtype=torch.float64):
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, heads, LENGTH, 5, dtype=dtype) for heads in (4, 2, 2))
    return q, k, v, -strength * torch.rand(SHAPES[kind], dtype=dtype), torch.randn(2, 2, 5, 5, dtype=dtype)


def gradients(given):
    given = [x.clone().requires_grad_() for x in given]
    out, last = scan(*given)
    return out, last, *torch.autograd.grad(out.sin().sum() + last.cos().sum(), given)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("numbers", [2**18, 2000])
def test_the_safe_way_equals_the_factored_one_with_all_gradients(kind, numbers, taken, monkeypatch):
    monkeypatch.setitem(pieces.NUMBERS, "cpu", numbers)
    given = draw(kind, 0.2)
    factored = gradients(given)
    assert set(taken) == {"Factored"}
    taken.clear()
    monkeypatch.setattr(near, "REACH", -1.0)
    for one, other in zip(gradients(given), factored, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert set(taken) == {SAFE[kind]}


@pytest.mark.parametrize("reach", [near.REACH, -1.0])
@pytest.mark.parametrize("kind", SHAPES)
def test_autocast_changes_nothing(kind, reach, monkeypatch):
    monkeypatch.setattr(near, "REACH", reach)
    given = draw(kind, 0.2, torch.float32)
    plain = gradients(given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for one, other in zip(gradients(given), plain, strict=True):
            assert one.dtype == torch.float32 and torch.equal(one, other)


@pytest.mark.parametrize("kind", SHAPES)
def test_the_factored_way_is_taken_only_within_reach(kind, taken):
    """With a decay of exactly REACH over a chunk of 64 it is still exact in float32; beyond, not taken."""
    for strength, name in ((near.REACH / 64, "Factored"), (1.001 * near.REACH / 64, SAFE[kind])):
        q, k, v, decay, state = draw(kind, 1.0, torch.float32)
        decay = torch.full_like(decay, -strength)
        taken.clear()
        found, last = scan(q, k, v, decay, state)
        assert taken[0] == name
        exact, end = scan(*(x.double() for x in (q, k, v, decay, state)))
        assert (found - exact).abs().max() < 3e-6 * exact.abs().max()
        assert (last - end).abs().max() < 3e-6 * end.abs().max()


def test_without_the_check_it_would_overflow(monkeypatch):
    q, k, v, decay, state = draw("channel", 10.0, torch.float32)
    assert scan(q, k, v, decay, state)[0].isfinite().all()
    monkeypatch.setattr(near, "REACH", float("inf"))
    assert not scan(q, k, v, decay, state)[0].isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 10.0, 80.0])
def test_softmax_over_the_sequence_by_channel(scale, taken):
    """Keys normalised by all before them (LightNet): decays that jump by hundreds and then stay near 0."""
    torch.manual_seed(0)
    q, v = torch.randn(1, 2, 700, 8), torch.randn(1, 2, 700, 4)
    raw = scale * torch.randn(1, 2, 700, 8)
    total = raw.double().logcumsumexp(2)
    before = torch.cat([torch.full_like(total[:, :, :1], -torch.inf), total[:, :, :-1]], 2)
    found, _ = scan(q, (raw - total).exp().float(), v, (before - total).float(), chunk=16)
    weights = raw.double()[:, :, None] - total[:, :, :, None]  # [B, H, T, S, D]
    late = torch.ones(700, 700).triu(1).bool()[..., None]
    scores = (q.double()[:, :, :, None] * weights.masked_fill(late, -torch.inf).exp()).sum(-1)
    exact = scores @ v.double()
    assert (found - exact).abs().max() < 3e-5 * exact.abs().max()
    assert taken[0] == "Halved"  # the first position forgets all


def test_gradients_stay_finite_and_right_where_all_is_forgotten(taken):
    q, k, v, decay, state = draw("channel", 0.1)
    decay[:, :, 40:100:7] = -torch.inf
    exact = gradients([q, k, v, decay, state])
    assert "Halved" in taken
    steps = [x.clone().requires_grad_() for x in (q, k, v, decay, state)]
    outs, now = [], steps[4]
    for i in range(LENGTH):
        out, now = scan(*(x[:, :, i : i + 1] for x in steps[:4]), now)
        outs.append(out)
    plain = torch.autograd.grad(torch.cat(outs, 2).sin().sum() + now.cos().sum(), steps)
    for one, other in zip(exact[2:], plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
