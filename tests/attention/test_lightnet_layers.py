"""LightNet's layers and positions: steps, padding, grids, class tokens, formulas written out, refusals."""

import pytest
import torch
import torch.nn.functional as F

from regard.attention import LightNetGrid, LightNetText, get
from regard.attention.lightnet import MDLRPE, MDTPE, coordinates
from regard.errors import RegardError, ShapeMismatch

TEXTS = [LightNetText(dim=12, heads=3, gate_rank=4), LightNetText(dim=12, heads=3, lrpe=False, preset="fla")]


def built(spec, seed=0):
    torch.manual_seed(seed)
    return spec.build().double()


def given(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("spec", TEXTS, ids=repr)
@pytest.mark.parametrize("length", [1, 65, 140])
def test_steps_of_any_size_are_the_whole(spec, length):
    layer, x = built(spec), given(2, length, 12)
    whole = layer(x)
    torch.testing.assert_close(whole, layer.reference(x), rtol=0, atol=1e-11)
    for size in (1, 3, 64):
        state, parts = None, []
        for piece in x.split(size, 1):
            out, state = layer.step(piece, state)
            parts.append(out)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-11)
    assert state[2].tolist() == [length] * 2


@pytest.mark.parametrize("spec", TEXTS, ids=repr)
def test_a_padded_batch_is_its_items(spec):
    layer, x = built(spec), given(2, 20, 12)
    for hidden in (slice(0, 6), slice(14, 20), slice(5, 9)):
        valid = torch.ones(2, 20, dtype=torch.bool)
        valid[0, hidden] = False
        state, parts = None, []
        for piece, seen in zip(x.split(4, 1), valid.split(4, 1), strict=True):
            out, state = layer.step(piece, state, seen)
            parts.append(out)
        alone = layer(x[:1, valid[0]])
        for found in (layer(x, valid), torch.cat(parts, 1)):
            torch.testing.assert_close(found[:1, valid[0]], alone, rtol=0, atol=1e-11)
            torch.testing.assert_close(found[1], layer(x[1:])[0], rtol=0, atol=1e-11)


def test_the_layer_is_its_formula():
    layer, x = built(TEXTS[1]), given(1, 7, 12)
    q, k, v = (m(x).view(1, 7, 3, 4).transpose(1, 2) for m in (layer.queries, layer.keys, layer.values))
    q = q * q.sigmoid() / 2
    heads = torch.stack([q[:, :, t, None] @ k[:, :, : t + 1].softmax(2).mT @ v[:, :, : t + 1]
                         for t in range(7)], 2)[:, :, :, 0]  # fmt: skip
    y = heads.transpose(1, 2).flatten(2)
    y = y / (y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight
    gate = x @ layer.gate[0].weight.T @ layer.gate[1].weight.T
    torch.testing.assert_close(layer(x), (y * gate * gate.sigmoid()) @ layer.output.weight.T)


def test_a_grid_flat_or_not_with_class_tokens_or_without():
    for grid in ((7,), (3, 5), (2, 3, 4)):
        layer = built(LightNetGrid(dim=12, heads=3, axes=len(grid)))
        x = given(2, *grid, 12)
        flat = x.flatten(1, -2)
        torch.testing.assert_close(layer(x).flatten(1, -2), layer(flat, grid=grid))
        front = torch.cat([given(2, 2, 12), flat], 1)
        out = layer(front, grid=grid, class_tokens=2)
        assert out.shape == front.shape
        moved = torch.autograd.functional.jacobian(
            lambda y, m=layer, g=grid: m(y, grid=g, class_tokens=2), front[:1]
        )
        assert (moved.abs().amax((0, 2, 3, 5)) > 0).all(), "a position that does not see all others"


def test_without_positions_a_grid_is_a_bag_and_with_them_not():
    x, order = given(1, 3, 5, 12), torch.randperm(15, generator=torch.Generator().manual_seed(0))
    for lrpe in (False, True):
        layer = built(LightNetGrid(dim=12, heads=3, lrpe=lrpe))
        shuffled = x.flatten(1, 2)[:, order].view(x.shape)
        same = torch.allclose(layer(shuffled).flatten(1, 2), layer(x).flatten(1, 2)[:, order])
        assert same != lrpe


def test_padding_is_seen_by_nobody_on_a_grid():
    layer, x = built(LightNetGrid(dim=12, heads=3, axes=1)), given(1, 9, 12)
    valid = torch.arange(9)[None] < 6
    found = layer(torch.where(valid[..., None], x, 1e4), valid=valid)
    torch.testing.assert_close(found[:, :6], layer(x[:, :6]))


def test_lrpe_has_one_group_of_channels_an_axis():
    pe = MDLRPE(6, 2, 3).double()
    with torch.no_grad():
        pe.theta.copy_(given(2, 2))
    cos, sin = pe(coordinates((2, 3, 4)), class_tokens=1)
    assert cos.shape == (1, 2, 25, 6) and (cos[:, :, 0] == 1).all() and not sin[:, :, 0].any()
    for place, (i, j, n) in enumerate(coordinates((2, 3, 4)).tolist()):
        for head in range(2):
            angle = torch.cat([c * pe.theta[head] for c in (i, j, n)])
            torch.testing.assert_close(cos[0, head, place + 1], angle.cos())
            torch.testing.assert_close(sin[0, head, place + 1], angle.sin())
    uneven, _ = MDLRPE(7, 2, 2, strict=False)(coordinates((2, 2)))
    assert uneven.shape == (1, 2, 4, 7)


@pytest.mark.parametrize("grid", [(6,), (3, 5), (2, 3, 4)], ids=str)
def test_tpe_smooths_every_axis(grid):
    torch.manual_seed(0)
    tpe, x = MDTPE(8, 2, len(grid)).double(), given(2, *grid, 8)
    expected = torch.zeros_like(x)
    for i, axis in enumerate(tpe.axes):
        rows, sums = x.movedim(i + 1, 0), []
        share = axis.decay.sigmoid().repeat_interleave(4)
        factor = (axis.a * axis.b).view(2, 4).sum(1).repeat_interleave(4)
        kept = torch.zeros_like(rows[0])
        for row in rows:
            kept = share * kept + row
            sums.append(factor * kept)
        y = torch.stack(sums).unflatten(-1, (2, 4))
        y = (y / (y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * axis.weight
        expected = expected + (y @ axis.output.weight.T).movedim(0, i + 1)
    torch.testing.assert_close(tpe(x), expected)
    front = torch.cat([given(2, 3, 8), x.flatten(1, -2)], 1)
    found = tpe(front, class_tokens=3, grid=grid)
    torch.testing.assert_close(found[:, 3:], expected.flatten(1, -2))
    assert torch.equal(found[:, :3], front[:, :3])


def test_tpe_of_a_text_steps():
    tpe, x = MDTPE(8, 2, 1).double(), given(2, 12, 8)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0, :5] = False
    one, state = tpe.step(x[:, :7], None, valid[:, :7])
    rest, _ = tpe.step(x[:, 7:], state, valid[:, 7:])
    found = torch.cat([one, rest], 1)
    torch.testing.assert_close(found[1], tpe(x)[1])
    torch.testing.assert_close(found[0, 5:], tpe(x[:, 5:])[0])


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda: MDLRPE(7, 2, 2), "head_dim is 7, which 2 axes do not divide"),
        (lambda: MDLRPE(8, 2, 4), "axes is 4"),
        (lambda: MDTPE(9, 2, 1), "dim is 9, which 2 heads do not divide"),
        (lambda: LightNetGrid(dim=12, heads=5), "dim is 12, which 5 heads do not divide"),
        (lambda: LightNetGrid(dim=12, heads=3, axes=0), "axes is 0"),
        (lambda: LightNetText(dim=12, heads=3, preset="xmixers"), "preset is 'xmixers'"),
        (lambda: LightNetText(dim=12, heads=3, gate_rank=0), "gate_rank is 0"),
        (lambda: LightNetText(dim=12, heads=3, eps=0), "eps is 0"),
        (lambda: get("lightnet-grid", dim=12), "needs 'heads'"),
        (lambda: MDTPE(8, 2, 2).step(torch.zeros(1, 3, 8)), "only positions of one axis"),
    ],
)
def test_wrong_options_are_refused(wrong, told):
    with pytest.raises(RegardError, match=told):
        wrong()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda: MDLRPE(8, 2, 2)(torch.zeros(5, 3)), "places must be"),
        (lambda: MDTPE(8, 2, 2)(torch.zeros(1, 5, 8)), "x must be"),
        (lambda: MDTPE(8, 2, 2)(torch.zeros(1, 16, 8), grid=(3, 5)), "15 positions; x has 16"),
        (lambda: built(LightNetGrid(dim=12, heads=3))(given(1, 16, 12), grid=(3, 5)), "x has 16"),
        (lambda: built(LightNetGrid(dim=12, heads=3))(given(1, 15, 12)), "where no grid is given"),
        (lambda: built(LightNetText(dim=12, heads=3))(given(1, 15, 11)), "x must be"),
        (lambda: built(LightNetText(dim=12, heads=3)).step(given(1, 2, 12), given(1, 2)), "three tensors"),
    ],
)  # fmt: skip
def test_wrong_shapes_are_refused(wrong, told):
    with pytest.raises(ShapeMismatch, match=told):
        wrong()


def test_layers_train():
    """A grid layer learns to copy a marked position to all others, which needs that all see it."""
    torch.manual_seed(0)
    layer = LightNetGrid(dim=8, heads=2, axes=2, lrpe=False).build()
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    for _ in range(150):
        marks = torch.randint(0, 16, (32,))
        colours = torch.randint(0, 4, (32,))
        x = torch.zeros(32, 16, 8)
        x[torch.arange(32), marks, colours] = 5.0
        logits = layer((x + 0.5).view(32, 4, 4, 8))[..., :4].flatten(1, 2)
        loss = F.cross_entropy(logits.flatten(0, 1), colours.repeat_interleave(16))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (logits.argmax(-1) == colours[:, None]).float().mean() > 0.95
