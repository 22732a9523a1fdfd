"""Normalised attention and the qLSTM: steps, the formula written out, and what separates their options."""

import pytest
import torch

from regard.attention import QLSTM, NormalizedAttention, get
from regard.attention.normalized import normalized_attention
from regard.errors import RegardError, ShapeMismatch

LAYERS = [
    NormalizedAttention(dim=12, heads=3, key_width=5, eta="exp"),
    NormalizedAttention(dim=12, heads=3, eta="softplus"),
    NormalizedAttention(dim=12, heads=3, eta="sigmoid"),
    QLSTM(dim=12, hidden=7),
    QLSTM(dim=12, reverse=False),
]
each = pytest.mark.parametrize("spec", LAYERS, ids=repr)


def built(spec, seed=0):
    torch.manual_seed(seed)
    return spec.build().double()


def given(length, batch=2):
    return torch.randn(
        batch, length, 12, generator=torch.Generator().manual_seed(length), dtype=torch.float64
    )


@each
@pytest.mark.parametrize("length", [1, 2, 65, 130])
def test_steps_of_any_size_are_the_whole(spec, length):
    layer, x = built(spec), given(length)
    whole = layer(x)
    torch.testing.assert_close(whole, layer.reference(x), rtol=0, atol=1e-11)
    for size in (1, 3, 64):
        state, parts = None, []
        for piece in x.split(size, 1):
            out, state = layer.step(piece, state)
            parts.append(out)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-11)


@each
def test_the_state_has_the_same_size_however_long_the_past(spec):
    layer = built(spec)
    sizes = {layer.step(given(length))[1].shape for length in (1, 50)}
    assert len(sizes) == 1
    x, beams = given(9), torch.tensor([1, 1])
    _, state = layer.step(x[:, :5])
    found, _ = layer.step(x[:, 5:], state[beams])
    torch.testing.assert_close(found[1], layer(x)[1, 5:])
    empty, same = layer.step(x[:, :0], state)
    assert empty.shape == (2, 0, 12) and torch.equal(same, state)


@each
def test_a_float32_state_beside_bfloat16(spec):
    layer = spec.build().bfloat16()
    out, state = layer.step(given(9).bfloat16())
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32


@pytest.mark.parametrize("eta", ["exp", "softplus", "sigmoid"])
def test_normalised_attention_is_the_formula(eta):
    torch.manual_seed(0)
    shapes = [1, 2, 7, 3], [1, 2, 7, 3], [1, 2, 7, 5], [1, 2, 7]
    q, k, v, logits = (torch.randn(s, dtype=torch.float64) for s in shapes)
    scale = {
        "exp": (-logits).exp(),
        "softplus": 1 / torch.log1p(logits.exp()),
        "sigmoid": 1 + (-logits).exp(),
    }[eta]
    found, _ = normalized_attention(q, k, v, logits, eta=eta)
    for h in range(2):
        for i in range(7):
            own = sum((q[0, h, i] @ k[0, h, j]) * v[0, h, j] for j in range(i + 1)) * scale[0, h, i]
            torch.testing.assert_close(found[0, h, i], own)


def test_reversed_and_plain_gates_differ_by_the_sign_of_the_forget_gate():
    plain, reverse = built(QLSTM(dim=12, reverse=False)), built(QLSTM(dim=12))
    x = given(20)
    reverse.load_state_dict(plain.state_dict(), strict=False)
    assert (plain(x) - reverse(x)).abs().max() > 1e-3
    with torch.no_grad():
        reverse.gates.weight[:12] *= -1
        reverse.gates.bias[:12] *= -1
    torch.testing.assert_close(reverse(x), plain(x))
    with torch.no_grad():
        reverse.alpha.fill_(-0.5)
    u, _, write, read = reverse.parts(x)
    torch.testing.assert_close(reverse.mix(x), read.sigmoid() * (write.sigmoid() * u).cumsum(1))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda: NormalizedAttention(dim=10, heads=3), "dim is 10, which 3 heads do not divide"),
        (lambda: NormalizedAttention(dim=12, heads=0), "heads is 0"),
        (lambda: NormalizedAttention(dim=12, heads=3, key_width=1.5), "key_width is 1.5"),
        (lambda: NormalizedAttention(dim=12, heads=3, eta="tanh"), "eta is 'tanh'; it must be one of exp"),
        (lambda: QLSTM(dim=12, hidden=0), "hidden is 0"),
        (lambda: QLSTM(dim=12, reverse="no"), "reverse is 'no'"),
        (lambda: get("normalized"), "needs 'dim'"),
    ],
)
def test_wrong_options_are_refused(wrong, told):
    with pytest.raises(RegardError, match=told):
        wrong()


@pytest.mark.parametrize("spec", LAYERS[:1] + LAYERS[3:4], ids=repr)
def test_wrong_shapes_are_refused(spec):
    layer = built(spec)
    with pytest.raises(ShapeMismatch, match="x must be"):
        layer(given(9)[..., :5])
    with pytest.raises(ShapeMismatch, match="x must be"):
        layer(given(9)[0])
    with pytest.raises(ShapeMismatch, match="the state must be"):
        layer.step(given(9), torch.zeros(2, 3, 4))
    q = torch.zeros(1, 2, 7, 3)
    with pytest.raises(ShapeMismatch, match="logits"):
        normalized_attention(q, q, q, torch.zeros(1, 7, 2))
