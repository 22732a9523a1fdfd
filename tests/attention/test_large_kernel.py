"""Large-kernel attention: its reach, its gate, its block, other sizes and axes, layouts, export, refusals."""

import copy

import pytest
import torch
import torch.nn.functional as F

from regard.attention import LargeKernel, LargeKernelAttention, LKABlock, LKALayer
from regard.attention.large_kernel import mlp
from regard.errors import RegardError, ShapeMismatch

SHAPES = {1: (2, 8, 30), 2: (2, 8, 12, 17), 3: (2, 8, 5, 6, 7)}


def drawn(shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def lively(block):
    """The block with scales and statistics that show."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, x in [*block.named_parameters(), *block.named_buffers()]:
            if "scale" in name or "running" in name:
                x.uniform_(0.3, 0.9)
    return block.eval()


def test_two_convolutions_are_one_of_23_by_23_where_no_border_is_near():
    layer = LargeKernelAttention(3, dtype=torch.float64)
    with torch.no_grad():
        layer.conv0.bias.zero_()
    x = drawn((1, 3, 60, 60), torch.float64)
    found = layer(x, return_attention=True)[1]
    wide = torch.zeros(3, 1, 7 * 3 - 2, 7 * 3 - 2, dtype=torch.float64)
    wide[:, :, ::3, ::3] = layer.conv_spatial.weight.detach()
    merged = F.conv2d(
        wide.transpose(0, 1), layer.conv0.weight.detach().flip(2, 3), padding=4, groups=3
    ).transpose(0, 1)
    assert merged.shape[-2:] == (23, 23)
    near = F.conv2d(x, merged, layer.conv_spatial.bias, padding=11, groups=3)
    expected = layer.conv1(near)
    inside = (slice(None), slice(None), slice(11, -11), slice(11, -11))
    torch.testing.assert_close(found[inside], expected[inside], rtol=0, atol=1e-6)
    assert (found - expected).abs()[:, :, :9, :9].max() > 1e-3, "each pads on its own"


@pytest.mark.parametrize(
    ("kernel", "dilation", "reach"), [(21, 3, 23), (7, 2, 9), (9, 1, 9), (35, 3, 38), (20, 4, 23)]
)
def test_it_reaches_as_far_as_it_says(kernel, dilation, reach):
    layer = LargeKernelAttention(1, kernel, dilation)
    assert layer.reach == reach
    x = drawn((1, 1, 81, 81)).requires_grad_()
    layer.attention(x)[0, 0, 40, 40].backward()
    touched = x.grad[0, 0] != 0
    assert touched.sum() == reach**2 and touched.any(0).sum() == touched.any(1).sum() == reach


def test_the_gate_follows_the_input_and_a_sum_would_not():
    """The operator of the product is another for another input; without the product it is the same."""
    layer = LargeKernelAttention(2, 5, 2, dtype=torch.float64)
    one, two = drawn((1, 2, 6, 6), torch.float64), drawn((2, 2, 6, 6), torch.float64)[1:]

    def moved(work):
        first, second = (torch.func.jacrev(work)(x) for x in (one, two))
        return float((first - second).detach().abs().max())

    assert moved(lambda x: x + layer.attention(x)) < 1e-12
    assert moved(layer) > 0.1
    assert (layer.attention(one) - layer.attention(two)).abs().max() > 0.1


def test_what_it_returns_and_shows_is_the_gate():
    layer = LargeKernelAttention(8)
    x = drawn(SHAPES[2])
    out, attention = layer(x, return_attention=True)
    torch.testing.assert_close(out, attention * x)
    assert torch.equal(out, layer(x)) and (attention < 0).any() and (attention > 0).any()
    shown = layer.maps(x)
    assert shown.kind == "gate" and shown.head == "channel" and torch.equal(shown.values, attention)
    block = lively(LKABlock(8))
    inner = block.attn.entered(block.norm1(x))
    torch.testing.assert_close(block.maps(x).values, block.attn.spatial_gating_unit.attention(inner))
    assert LargeKernelAttention(8, axes=3).shows is None


def test_parameters_are_counted_as_the_paper_counts_them():
    layer = LargeKernelAttention(64)
    weights = [x for name, x in layer.named_parameters() if name.endswith("weight")]
    assert sum(x.numel() for x in weights) == 64 * (25 + 49 + 64)
    sizes = {d: 64 * ((2 * d - 1) ** 2 + (-(-21 // d)) ** 2 + 64) for d in range(1, 8)}
    assert min(sizes, key=sizes.get) == 3


@pytest.mark.parametrize("axes", SHAPES)
def test_the_fast_path_in_evaluation_is_the_definition(axes, monkeypatch):
    block, x = lively(LKABlock(8, 4.0, 9, 2, axes)), drawn(SHAPES[axes])
    expected = block.reference(x)
    calls = []
    stretches = mlp.ConvMLP._in_stretches
    monkeypatch.setattr(mlp.ConvMLP, "_in_stretches", lambda *a: calls.append(1) or stretches(*a))
    for room in (2**20, 64):
        monkeypatch.setattr(mlp, "ROOM", room)
        monkeypatch.setattr(mlp, "STEP", 5)
        monkeypatch.setattr("regard.attention.large_kernel.block.ROOM", room)
        with torch.no_grad():
            torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-5)
    assert calls, "the MLP was taken in stretches"
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("axes", SHAPES)
def test_the_inner_residual_adds_the_normed_map(axes):
    block, x = lively(LKABlock(8, 2.0, 7, 2, axes)).double(), drawn(SHAPES[axes], torch.float64)
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(block.attn.proj_2, name).zero_()
            getattr(block.mlp.fc2, name).zero_()
    scale = block.layer_scale_1.view(-1, *[1] * axes)
    torch.testing.assert_close(block(x), x + scale * block.norm1(x))


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (33, 2)])
def test_any_size_and_channels_last(size):
    block, x = lively(LKABlock(8)), drawn((2, 8, *size))
    out = block(x)
    assert out.shape == x.shape and out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(block(x.contiguous(memory_format=torch.channels_last)), out)
    torch.testing.assert_close(out, block.reference(x), rtol=0, atol=1e-5)


def test_float16_autocast_does_not_overflow():
    layer = LargeKernelAttention(4)
    with torch.no_grad():
        layer.conv1.weight.zero_()
        layer.conv1.bias.fill_(500.0)
    x = torch.full((1, 4, 9, 9), 400.0)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        assert (x.half() * 500).isinf().all(), "which the product in float16 would be"
        out = layer(x.half())
        assert out.dtype == torch.float32 and torch.equal(out, torch.full_like(out, 2e5))
        block = lively(LKABlock(4))
        block.attn.spatial_gating_unit = layer
        block.layer_scale_1.fill_(1e-3)
        assert block(100 * drawn((1, 4, 9, 9))).isfinite().all()


def test_it_is_exported_and_compiled():
    block, x = lively(LKABlock(8)), drawn(SHAPES[2])
    program = torch.export.export(block, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    more = drawn((3, *SHAPES[2][1:]))
    torch.testing.assert_close(program.module()(more), block(more), rtol=0, atol=1e-5)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    given = [x.clone().requires_grad_() for _ in range(2)]
    for work, one in zip((block, compiled), given, strict=True):
        work(one).sin().sum().backward()
    torch.testing.assert_close(given[0].grad, given[1].grad, rtol=1e-3, atol=1e-3)


def test_training_learns_and_drop_path_is_used():
    block = LKABlock(8, layer_scale=0.5, dropout=0.1, drop_path=torch.nn.Dropout(0.5))
    x = drawn((4, 8, 9, 9))
    assert not torch.equal(block(x), block(x))
    still = copy.deepcopy(block).eval()
    assert torch.equal(still(x), still(x))
    block(x).sum().backward()
    assert all(p.grad is not None for p in block.parameters())


@pytest.mark.parametrize(
    ("call", "kind", "told"),
    [
        (lambda: LargeKernelAttention(0), RegardError, "dim is 0; it must be a whole number from 1"),
        (lambda: LargeKernelAttention(8, 21, 0), RegardError, "dilation is 0"),
        (lambda: LargeKernelAttention(8, 3, 5), RegardError, "dilation is 5 and kernel 3"),
        (lambda: LargeKernelAttention(8, 2.5), RegardError, "kernel is 2.5"),
        (lambda: LargeKernel(dim=8, axes=4), RegardError, "axes is 4; it must be 1, 2 or 3"),
        (lambda: LKALayer(dim=8, mlp_ratio=0), RegardError, "mlp_ratio is 0"),
        (
            lambda: LargeKernelAttention(8)(torch.zeros(1, 4, 9, 9)),
            ShapeMismatch,
            "8, height, width.*.1, 4",
        ),
        (lambda: LargeKernelAttention(8)(torch.zeros(8, 9, 9)), ShapeMismatch, "x must be"),
        (lambda: LKABlock(8, axes=1)(torch.zeros(1, 8, 9, 9)), ShapeMismatch, "8, X1"),
        (lambda: LKABlock(8)(torch.zeros(1, 8, 1, 1)), RegardError, "one number a channel"),
        (lambda: LKABlock(8)(torch.zeros(1, 8, 4, 4, dtype=torch.int64)), ShapeMismatch, "floating-point"),
        (lambda: LargeKernelAttention(8, axes=1).maps(torch.zeros(1, 8, 9)), RegardError, "no map"),
    ],
)
def test_wrong_input_is_refused(call, kind, told):
    with pytest.raises(kind, match=told):
        call()
