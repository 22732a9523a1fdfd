"""Halo attention: against a loop over pixels, at the extremes, at borders, strided, and refusals."""

import itertools

import pytest
import torch
from torch import nn

from regard.attention import get
from regard.attention.halo import HaloAttention, HaloGrid, halo_attention, replace_conv3x3
from regard.attention.neighborhood import na2d
from regard.errors import RegardError, ShapeMismatch

B, H, D, DV = 2, 2, 5, 3


def drawn(grid, stride=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(len(grid))
    fewer = [-(-n // stride) for n in grid]
    shapes = ((B, *fewer, H, D), (B, *grid, H, D), (B, *grid, H, DV))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def tables(block, halo):
    return [
        torch.randn(2 * (b + 2 * h) - 1, D, dtype=torch.float64) for b, h in zip(block, halo, strict=True)
    ]


def by_pixels(q, k, v, block, halo, rel, border, stride, rel_stride, scale=D**-0.5):
    """One pixel after another, with offsets written out."""
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    height, width = k.shape[1:3]
    for y, x in itertools.product(range(q.shape[1]), range(q.shape[2])):
        row, column = y * stride, x * stride
        i, j = row % block[0] // stride, column % block[1] // stride
        top, left = row - row % block[0] - halo[0], column - column % block[1] - halo[1]
        scores, values = [], []
        for u, t in itertools.product(range(block[0] + 2 * halo[0]), range(block[1] + 2 * halo[1])):
            key = top + u, left + t
            inside = 0 <= key[0] < height and 0 <= key[1] < width
            if not inside and border == "mask":
                continue
            own = k[:, *key] if inside else torch.zeros_like(k[:, 0, 0])
            score = scale * (q[:, y, x] * own).sum(-1)
            if rel is not None:
                down = rel[0][block[0] + 2 * halo[0] - 1 + u - rel_stride * i]
                across = rel[1][block[1] + 2 * halo[1] - 1 + t - rel_stride * j]
                score = score + q[:, y, x] @ (down + across)
            scores.append(score)
            values.append(v[:, *key] if inside else torch.zeros_like(v[:, 0, 0]))
        weights = torch.stack(scores, -1).softmax(-1)
        out[:, y, x] = (weights[..., None, :] @ torch.stack(values, -2))[..., 0, :]
    return out


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("border", ["zero", "mask"])
@pytest.mark.parametrize(("stride", "rel_stride"), [(1, 1), (2, 1), (2, 2)])
def test_it_is_a_loop_over_pixels(stride, rel_stride, border, placed):
    block, halo = (4, 2), (1, 2)
    q, k, v = drawn((8, 6), stride)
    rel = tables(block, halo) if placed else None
    found = [
        halo_attention(q, k, v, block, halo, rel, border, stride, rel_stride=rel_stride, impl=impl)
        for impl in ("windows", "dense")
    ]
    if placed:
        options = {"rel_stride": rel_stride, "impl": "windows"}
        found.append(halo_attention(q, k, v, block, halo, torch.stack(rel), border, stride, **options))
    expected = by_pixels(q, k, v, block, halo, rel, border, stride, rel_stride)
    for one in found:
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-13)


def test_the_layer_is_that_loop_with_the_channels_of_timm():
    torch.manual_seed(0)
    layer = HaloAttention(6, 8, heads=2, block=4, halo=1, dim_head=D, stride=2, rel_stride=1).double()
    x = torch.randn(B, 6, 8, 12, dtype=torch.float64)
    q = torch.einsum("bcyx,oc->byxo", x[:, :, ::2, ::2], layer.q.weight[:, :, 0, 0]).unflatten(-1, (2, D))
    kv = torch.einsum("bcyx,oc->byxo", x, layer.kv.weight[:, :, 0, 0]).unflatten(-1, (2, D + 4))
    rel = [layer.pos_embed.height_rel, layer.pos_embed.width_rel]
    expected = by_pixels(q, kv[..., :D], kv[..., D:], (4, 4), (1, 1), rel, "zero", 2, 1)
    expected = expected.permute(0, 3, 4, 1, 2).flatten(1, 2)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(layer.reference(x), expected, rtol=0, atol=1e-13)


def attended(q, k, v, mask=None):
    flat = [x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)]
    out = nn.functional.scaled_dot_product_attention(*flat, attn_mask=mask)
    return out.transpose(1, 2).reshape(*q.shape[:-1], v.shape[-1])


def test_extremes_are_other_attention():
    q, k, v = drawn((6, 6))
    for found in (
        halo_attention(q, k, v, 6, 0),
        halo_attention(q, k, v, 3, 3, border="mask"),
        halo_attention(q, k, v, 2, 9, border="mask"),
    ):
        torch.testing.assert_close(found, attended(q, k, v), rtol=0, atol=1e-13)
    at = torch.arange(6)
    near = (at[:, None] - at).abs() <= 1
    mask = (near[:, None, :, None] & near[None, :, None, :]).flatten(2).flatten(0, 1)
    found = halo_attention(q, k, v, 1, 1, border="mask")
    torch.testing.assert_close(found, attended(q, k, v, mask), rtol=0, atol=1e-13)
    parts = [x[:, :3, 3:] for x in (q, k, v)]
    torch.testing.assert_close(halo_attention(q, k, v, 3, 0)[:, :3, 3:], attended(*parts), rtol=0, atol=1e-13)


def test_the_interior_is_neighbourhood_attention_with_a_stride():
    q, k, v = drawn((20, 16))
    found, other = halo_attention(q, k, v, 4, 2), na2d(q, k, v, 8, stride=4)
    inside = (slice(None), slice(4, 16), slice(4, 12))
    torch.testing.assert_close(found[inside], other[inside], rtol=0, atol=1e-13)
    assert (found - other).abs().max() > 0.1, "at the border windows are padded there, moved inside here"


def test_the_border_rule_moves_border_blocks_alone():
    q, k, v = drawn((12, 12))
    off = (halo_attention(q, k, v, 4, 1) - halo_attention(q, k, v, 4, 1, border="mask")).abs().amax((0, 3, 4))
    assert off[4:8, 4:8].max() == 0 and off[:4].min() > 0 and off[:, 8:].min() > 0 and off.max() > 0.1


def test_a_shift_by_a_block_shifts_the_interior_and_one_by_a_pixel_does_not():
    q, k, v = drawn((20, 20))
    whole = halo_attention(q, k, v, 4, 2)
    inside = (slice(None), slice(4, 12), slice(4, 12))
    off = []
    for step in (4, 1):
        moved = halo_attention(*(x.roll((step, step), (1, 2)) for x in (q, k, v)), 4, 2)
        off.append((moved.roll((-step, -step), (1, 2)) - whole)[inside].abs().max())
    assert off[0] < 1e-13 and off[1] > 0.1


@pytest.mark.parametrize("border", ["zero", "mask"])
def test_maps_that_blocks_do_not_divide(border):
    block, halo = (4, 2), (1, 2)
    q, k, v = drawn((6, 7))
    rel = tables(block, halo)
    found = halo_attention(q, k, v, block, halo, rel, border, pad="auto")
    filled = [nn.functional.pad(x, (0, 0, 0, 0, 0, 1, 0, 2)) for x in (q, k, v)]
    masked = halo_attention(*filled, block, halo, rel, border)
    assert found.shape == (B, 6, 7, H, DV)
    torch.testing.assert_close(found[:, :3, :4], masked[:, :3, :4], msg="windows that end inside")
    assert (found - masked[:, :6, :7])[:, 3:].abs().max() > 0.01, "padding is not seen"
    if border == "mask":
        by_hand = by_pixels(q, k, v, block, halo, rel, "mask", 1, 1)
        torch.testing.assert_close(found, by_hand, rtol=0, atol=1e-13)
    same = [halo_attention(q[:, :4, :6], k[:, :4, :6], v[:, :4, :6], block, halo, rel, border, pad=pad)
            for pad in ("auto", "error")]  # fmt: skip
    assert torch.equal(*same)
    with pytest.raises(ShapeMismatch, match="map is 6 x 7, which blocks of 4 x 2 do not divide; .* 8 x 8"):
        halo_attention(q, k, v, block, halo)


def test_a_causal_line_sees_the_block_so_far_and_the_halo_before():
    q, k, v = drawn((11,))
    rel = [torch.randn(2 * 7 - 1, D, dtype=torch.float64)]
    found = halo_attention(q, k, v, 4, 3, rel, "mask", pad="auto", is_causal=True)
    for t in range(11):
        keys = range(max(0, t // 4 * 4 - 3), t + 1)
        scores = [D**-0.5 * (q[:, t] * k[:, s]).sum(-1) + q[:, t] @ rel[0][6 + 3 + s - t] for s in keys]
        weights = torch.stack(scores, -1).softmax(-1)
        expected = (weights[..., None, :] @ v[:, list(keys)].transpose(1, 2))[..., 0, :]
        torch.testing.assert_close(found[:, t], expected, rtol=0, atol=1e-13)
    layer = HaloAttention(8, heads=2, block=4, halo=3, axes=1, is_causal=True).double()
    x = torch.randn(1, 8, 12, dtype=torch.float64)
    after = torch.cat([x[:, :, :6], x[:, :, 6:] + 1], 2)
    assert torch.equal(layer(x)[:, :, :6], layer(after)[:, :, :6])
    assert not torch.equal(layer(x)[:, :, 6:], layer(after)[:, :, 6:])


def test_only_the_tables_depend_on_block_and_halo():
    def count(**options):
        return sum(p.numel() for p in HaloAttention(32, heads=4, **options).parameters())

    plain = count(relative=False, block=2, halo=0)
    assert plain == count(relative=False, block=14, halo=5) == 3 * 32 * 32
    for b, h in ((2, 0), (8, 3), (14, 2)):
        assert count(block=b, halo=h) == plain + 2 * (2 * (b + 2 * h) - 1) * 8


def test_averaged_queries_are_the_mean_of_four():
    torch.manual_seed(0)
    layer = HaloAttention(8, heads=2, block=3, halo=1, stride=2, average=True).double()
    whole = HaloAttention(8, heads=2, block=3, halo=1).double()
    whole.load_state_dict(layer.state_dict())
    x = torch.randn(1, 8, 6, 6, dtype=torch.float64)
    expected = whole(x).unflatten(3, (3, 2)).unflatten(2, (3, 2)).mean((3, 5))
    torch.testing.assert_close(layer(x), expected)
    x = torch.randn(1, 8, 9, 6, dtype=torch.float64)
    last = whole(x)[:, :, 8:].unflatten(3, (3, 2)).mean(4)
    assert layer(x).shape == (1, 8, 5, 3)
    torch.testing.assert_close(layer(x)[:, :, 4:], last)


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"border": "mask", "pad": "auto"}, {"average": True}])
def test_rows_are_the_weights_that_make_the_output(options):
    torch.manual_seed(1)
    stride = 2 if options.get("average") else options.get("stride", 1)
    layer = HaloAttention(8, heads=2, block=4, halo=2, **{**options, "stride": stride}).double()
    x = torch.randn(2, 8, 7 if "pad" in options else 8, 12, dtype=torch.float64)
    (height, width), plane = layer.grids(x)
    rows = layer.rows(x, range(height * width))
    assert rows.shape == (2, 2, height * width, plane[0] * plane[1])
    v = layer.kv(x).flatten(2).unflatten(1, (2, -1))[:, :, layer.dim_head :]
    out = (v @ rows.mT).flatten(1, 2).unflatten(2, (height, width))
    out = nn.functional.avg_pool2d(out, 2) if options.get("average") else out
    torch.testing.assert_close(out, layer(x), rtol=0, atol=1e-13)
    sums = rows.sum(-1)
    assert (sums < 0.999).any() if layer.border == "zero" else torch.allclose(sums, torch.ones_like(sums))
    assert torch.equal(layer.rows(x, [3, 0]), rows[:, :, [3, 0]])


def test_convolutions_of_a_resnet_block_are_replaced():
    from transformers.models.resnet.modeling_resnet import ResNetBottleNeckLayer

    torch.manual_seed(0)
    for stride in (1, 2):
        block = ResNetBottleNeckLayer(64, 128, stride=stride).eval()
        x = torch.randn(1, 64, 14, 10)
        before = block(x)
        assert replace_conv3x3(block, block=4, halo=1) == ["layer.1.convolution"]
        layer = block.layer[1].convolution
        assert isinstance(layer, HaloAttention) and (layer.heads, layer.stride) == (2, stride)
        after = block(x)
        assert after.shape == before.shape and not torch.allclose(after, before)
        after.sum().backward()
        assert layer.pos_embed.height_rel.grad.abs().sum() > 0
    with pytest.raises(RegardError, match="holds no 3 x 3 convolution"):
        replace_conv3x3(nn.Conv2d(4, 4, 3, padding=1))
    with pytest.raises(RegardError, match=r"0 has 24 channels, which heads of 16 do not divide; give heads"):
        replace_conv3x3(nn.Sequential(nn.Conv2d(4, 24, 3, padding=1)))
    kept = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1))
    with pytest.raises(RegardError):
        replace_conv3x3(kept)
    assert isinstance(kept[0], nn.Conv2d), "nothing is replaced where not all can be"


WRONG = [
    (lambda q, k, v: halo_attention(q, k, v, 0, 1), "block is 0; it must be whole numbers from 1"),
    (lambda q, k, v: halo_attention(q, k, v, (4, 4, 4), 1), "block is .* one number or 2"),
    (lambda q, k, v: halo_attention(q, k, v, 4, -1), "halo is -1; it must be whole numbers from 0"),
    (lambda q, k, v: halo_attention(q, k, v, 4, 1, stride=3), "stride is 3; it must be one of 1, 2"),
    (lambda q, k, v: halo_attention(q, k, v, 3, 1, stride=2), "block is 3 with stride 2; it must be even"),
    (lambda q, k, v: halo_attention(q, k, v, 4, 1, border="wrap"), "border is 'wrap'; .* 'zero', 'mask'"),
    (lambda q, k, v: halo_attention(q, k, v, 4, 1, pad=True), "pad is True"),
    (lambda q, k, v: halo_attention(q, k, v, 4, 1, is_causal=True), "is_causal needs a line"),
    (lambda q, k, v: halo_attention(q, k, v, 4, 1, impl="fast"), "impl is 'fast'"),
    (lambda q, k, v: halo_attention(q, k, v, 4, 1, stride=2), r"q \[2, 4, 4, 2, 5\] with stride 2"),
    (lambda q, k, v: halo_attention(q, k[:, 1:], v, 4, 1), "must be of one map and heads"),
    (lambda q, k, v: halo_attention(q, k.float(), v, 4, 1), "one dtype and device"),
    (lambda q, k, v: halo_attention(q, k, v, 4, 1, [torch.zeros(11, 5)]), r"one table an axis, \[\[11, 5\]"),
    (lambda q, k, v: halo_attention(q, k, v, 4, 1, [torch.zeros(9, 5)] * 2), r"and is \[\[9, 5\]"),
    (lambda q, k, v: HaloAttention(12, heads=5), "dim_out is 12, which 5 heads do not divide"),
    (lambda q, k, v: HaloAttention(12, heads=0), "heads is 0; it must be a whole number from 1"),
    (lambda q, k, v: HaloAttention(12, heads=2, block=7, stride=2), "must be even, or the output averaged"),
    (lambda q, k, v: HaloAttention(12, heads=2, axes=4), "axes is 4; it must be 1, 2 or 3"),
    (lambda q, k, v: HaloGrid(dim=12, heads=2, block=4, halo=1, stride=4), "stride is 4"),
    (lambda q, k, v: HaloAttention(8, heads=2)(torch.zeros(1, 9, 8, 8)), r"x must be \[batch, 8, 2 axes\]"),
    (lambda q, k, v: HaloAttention(8, heads=2)(torch.zeros(1, 8, 5, 7)), "map is 5 x 7, .* must be 8 x 8"),
    (lambda q, k, v: HaloAttention(8, axes=1).rows(torch.zeros(1, 8, 8), [0]), "no rows of weights"),
]


@pytest.mark.parametrize(("work", "words"), WRONG, ids=[words[:40] for _, words in WRONG])
def test_wrong_input_ends_in_one_sentence(work, words):
    with pytest.raises(RegardError, match=words) as told:
        work(*drawn((8, 8)))
    assert str(told.value).count(". ") == 0


def test_it_is_a_mechanism_by_name():
    spec = get("halo-grid", dim=8, heads=2, block=[4, 2], halo=1)
    assert spec == HaloGrid(dim=8, heads=2, block=(4, 2), halo=1)
    assert spec.build()(torch.zeros(1, 8, 4, 2)).shape == (1, 8, 4, 2)
