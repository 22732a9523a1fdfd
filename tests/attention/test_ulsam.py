"""Subspace attention: groups at once as in the loop, its counts, options, official weights, refusals."""

import copy
import math

import pytest
import torch
from torch import nn

from regard.attention import ULSAM, Subspaces
from regard.attention.ulsam import fused_weights
from regard.errors import RegardError, ShapeMismatch


def drawn(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def lively(layer):
    torch.manual_seed(0)
    with torch.no_grad():
        for x in layer.parameters():
            x.add_(0.3 * torch.randn_like(x))
        for name, x in layer.named_buffers():
            if "running" in name:
                x.uniform_(0.5, 1.5)
    return layer


class OneSubspace(nn.Module):
    """A group as it is written, with the official names."""

    def __init__(self, size):
        super().__init__()
        self.conv_dws, self.bn_dws = nn.Conv2d(size, size, 1, groups=size), nn.BatchNorm2d(size, momentum=0.9)
        self.conv_point, self.bn_point = nn.Conv2d(size, 1, 1), nn.BatchNorm2d(1, momentum=0.9)

    def forward(self, x):
        h = self.bn_dws(self.conv_dws(x)).clamp(min=0)
        h = nn.functional.max_pool2d(h, 3, 1, 1)
        logits = self.bn_point(self.conv_point(h)).clamp(min=0)
        weights = (logits.flatten(1) - logits.flatten(1).max(1, True).values).exp()
        weights = weights / weights.sum(1, True)
        return x * weights.view(logits.shape) + x


class Loop(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.subspaces = nn.ModuleList(OneSubspace(channels // groups) for _ in range(groups))

    def forward(self, x):
        parts = x.chunk(len(self.subspaces), 1)
        return torch.cat([one(part) for one, part in zip(self.subspaces, parts, strict=True)], 1)


@pytest.mark.parametrize("groups", [1, 4, 12])
def test_it_is_the_loop_over_groups_with_its_statistics_and_gradients(groups):
    loop, layer = lively(Loop(12, groups)).double(), ULSAM(12, groups, momentum=0.9).double()
    layer.load_state_dict(fused_weights(loop.state_dict()))
    x = drawn(3, 12, 7, 5)
    for training in (True, False):
        loop.train(training), layer.train(training)
        given = [x.clone().requires_grad_() for _ in range(2)]
        outs = [work(one) for work, one in zip((loop, layer), given, strict=True)]
        torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-12)
        for out in outs:
            out.sin().sum().backward()
        torch.testing.assert_close(given[1].grad, given[0].grad, rtol=0, atol=1e-12)
    for name, expected in fused_weights(loop.state_dict()).items():
        torch.testing.assert_close(layer.state_dict()[name], expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(layer.float()(x.float()), loop(x).float(), rtol=0, atol=1e-6)


def test_parameters_are_those_of_the_formula():
    def count(layer):
        return sum(p.numel() for p in layer.parameters())

    for channels, groups in ((64, 4), (512, 1), (96, 16)):
        assert count(ULSAM(channels, groups)) == 5 * channels + 3 * groups
        assert count(ULSAM(channels, groups, norm=False)) == 2 * channels


@pytest.mark.parametrize("options", [{}, {"norm": False}, {"final_relu": False}, {"temperature": 0.1}])
def test_weights_sum_to_one_over_the_positions(options):
    layer, x = lively(ULSAM(8, 2, **options)).double().eval(), drawn(2, 8, 6, 7)
    weights = layer.attention(x)
    assert weights.shape == (2, 2, 6, 7) and (weights > 0).all()
    torch.testing.assert_close(weights.sum((2, 3)), torch.ones(2, 2, dtype=torch.float64))
    expected = x.unflatten(1, (2, 4)) * (1 + weights[:, :, None])
    torch.testing.assert_close(layer(x), expected.flatten(1, 2))
    torch.testing.assert_close(layer.reference(x), expected.flatten(1, 2))


def test_the_paper_form_is_its_formula():
    layer, x = lively(ULSAM(6, 3, norm=False)).double(), drawn(2, 6, 5, 5)
    h = nn.functional.max_pool2d(x * layer.conv_dws.weight.view(-1, 1, 1), 3, 1, 1)
    logits = (h * layer.conv_point.weight.flatten().view(-1, 1, 1)).unflatten(1, (3, 2)).sum(2)
    weights = logits.flatten(2).softmax(2).view(logits.shape)
    expected = x * (1 + weights.repeat_interleave(2, 1))
    torch.testing.assert_close(layer(x), expected)
    assert [name for name, _ in layer.named_parameters()] == ["conv_dws.weight", "conv_point.weight"]


def test_without_a_pointwise_kernel_it_is_nearly_the_identity():
    layer, x = ULSAM(8, 2).double().eval(), drawn(2, 8, 14, 14)
    with torch.no_grad():
        layer.conv_point.weight.zero_()
    torch.testing.assert_close(layer(x), x * (1 + 1 / 196))
    mean = ULSAM(8, 2, factor="mean").double().eval()
    mean.load_state_dict(layer.state_dict())
    torch.testing.assert_close(mean(x), 2 * x)


def test_groups_do_not_meet_and_channels_within_one_can_be_permuted():
    layer, x = lively(ULSAM(8, 2)).double().eval(), drawn(1, 8, 6, 6)
    moved = x.clone()
    moved[:, 4:] += 1
    assert torch.equal(layer(moved)[:, :4], layer(x)[:, :4])
    order = torch.tensor([2, 0, 3, 1, 7, 5, 6, 4])
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for name, value in other.state_dict().items():
            if "dws" in name and value.ndim:
                value.copy_(layer.state_dict()[name][order])
        within = (order % 4).view(2, 4, 1, 1)
        other.conv_point.weight.copy_(layer.conv_point.weight.gather(1, within))
    torch.testing.assert_close(other(x[:, order]), layer(x)[:, order])


def test_options_do_what_they_say():
    layer, x = lively(ULSAM(8, 2)).double().eval(), drawn(2, 8, 6, 6)

    def like(**options):
        other = ULSAM(8, 2, **options).double().eval()
        other.load_state_dict(layer.state_dict())
        return other

    sharp, flat = (like(temperature=t).attention(x).amax((2, 3)) for t in (0.2, 5.0))
    most = layer.attention(x).amax((2, 3))
    assert (sharp >= most).all() and (most >= flat).all() and (sharp - flat).max() > 0.03
    cut, whole = layer.attention(x), like(final_relu=False).attention(x)
    least = [(a.flatten(2).min(2, True).values == a.flatten(2)).sum() for a in (cut, whole)]
    assert least[0] > 2 * least[1], "what relu cut has one weight"
    near = like(weights="sigmoid")
    assert near.maps(x).kind == "factor" and layer.maps(x).kind == "probability"
    assert layer.maps(x).head == "group" and ((near.attention(x) >= 0.5) & (near.attention(x) < 1)).all()


def test_any_size_layout_half_precision_and_export():
    layer = lively(ULSAM(8, 2)).eval()
    for size in ((1, 1), (1, 9), (14, 3)):
        x = drawn(2, 8, *size, dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), layer.reference(x), rtol=0, atol=1e-5)
        out = layer(x)
        assert out.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(out, layer.reference(x), rtol=0, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(x), out, rtol=0, atol=0.02)
        assert layer.attention(x).dtype == torch.float32
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), out)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), out, rtol=0, atol=1e-5)
    x[0, 0, 0, 0] = math.nan
    assert layer(x)[0].isnan().any() and layer(x)[1].isfinite().all()


@pytest.mark.parametrize(
    ("call", "kind", "told"),
    [
        (lambda: ULSAM(12, 5), RegardError, "5 groups do not divide 12 channels; what does is 1, 2, 3, 4, 6"),
        (lambda: ULSAM(0), RegardError, "channels is 0"),
        (lambda: ULSAM(8, 2.0), RegardError, "groups is 2.0"),
        (lambda: ULSAM(8, temperature=0), RegardError, "temperature is 0"),
        (lambda: ULSAM(8, weights="relu"), RegardError, "weights is 'relu'; it must be softmax or sigmoid"),
        (lambda: Subspaces(channels=8, factor="hw"), RegardError, "factor is 'hw'"),
        (lambda: ULSAM(8, momentum=1.5), RegardError, "momentum is 1.5"),
        (lambda: ULSAM(8)(torch.zeros(8, 5, 5)), ShapeMismatch, "8, height, width.*.8, 5, 5"),
        (lambda: ULSAM(8)(torch.zeros(1, 4, 5, 5)), ShapeMismatch, "x must be"),
        (lambda: ULSAM(8)(torch.zeros(1, 8, 1, 1)), RegardError, "one number a channel"),
        (lambda: fused_weights({"conv.weight": torch.zeros(1)}), RegardError, "no subspaces.0"),
    ],
)
def test_wrong_input_is_refused(call, kind, told):
    with pytest.raises(kind, match=told):
        call()
