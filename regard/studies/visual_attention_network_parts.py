"""What the study of large-kernel attention trains and measures: pairs at a distance, arms, reach, operators.

Pairs: an image [1, 40, 40] of zeros with two ones `distance` apart, 12 pixels from the edge at least, since
zero padding tells where the edge is; the label is whether they lie side by side or one above the other, which
no pooling over positions knows.

Arms differ in what stands in the place of the gate a * x, a = W dwd(dw(x)):

    product   a * x                             sum       a + x
    near      a = W dw(x), 5 x 5 alone          plain     a = W dw'(x), dw' dense 9 x 9, as many weights
    blind     a = W x, no space                 none      x
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.attention.large_kernel import LargeKernelAttention, LKABlock
from regard.engines.depthwise import depthwise
from regard.models.images import image_model
from regard.studies.classifying_parts import right, trained
from regard.tasks.images import Images, normalized

SIDE, EDGE, WIDTH, PLAIN, BATCH = 40, 12, 16, 9, 16
CLASSIFIER = {"widths": [24, 48], "depths": [1, 1], "strides": [2, 2], "mlp_ratios": [4, 4]}


class Gate(nn.Module):
    """An arm in the place of large-kernel attention."""

    def __init__(self, kind: str, dim: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "sum":
            self.layer = LargeKernelAttention(dim)
        taps = {"near": 5, "plain": PLAIN}.get(kind)
        if taps:
            self.convolution = nn.Conv2d(dim, dim, taps, padding=taps // 2, groups=dim)
        if kind in ("near", "plain", "blind"):
            self.point = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "none":
            return x
        if self.kind == "sum":
            return x + self.layer.attention(x)
        near = x
        if self.kind != "blind":
            near = depthwise(x, self.convolution.weight, self.convolution.bias)
        return x * self.point(near)


def gate(kind: str, dim: int) -> nn.Module:
    """Return an arm, with fresh weights."""
    return LargeKernelAttention(dim) if kind == "product" else Gate(kind, dim)


class Pairs(nn.Module):
    """Two blocks of width 16 between a 1 x 1 stem and the mean over positions; logits [B, 2]."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTH, 1)
        self.blocks = nn.Sequential(*(LKABlock(WIDTH, mlp_ratio=2.0, layer_scale=0.1) for _ in range(2)))
        for block in gated(self.blocks):
            block.attn.spatial_gating_unit = gate(kind, WIDTH)
        self.norm, self.head = nn.BatchNorm2d(WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.blocks(self.stem(images))).mean((2, 3)))
        return out


def pairs(count: int, distance: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return images [count, 1, 40, 40] and labels, 0 where the two ones lie side by side."""
    labels = torch.randint(2, (count,), generator=generator)
    room = SIDE - 2 * EDGE
    along = EDGE + torch.randint(room - distance, (count,), generator=generator)
    across = EDGE + torch.randint(room, (count,), generator=generator)
    images = torch.zeros(count, 1, SIDE, SIDE)
    for step in (0, distance):
        row = torch.where(labels == 0, across, along + step)
        column = torch.where(labels == 0, along + step, across)
        images[torch.arange(count), 0, row, column] = 1
    return images, labels


def apart(kind: str, distance: int, seed: int, steps: int, tick: Any) -> float:
    """Train an arm on pairs, and return its accuracy on others."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = trained(Pairs(kind), lambda: pairs(BATCH, distance, generator), steps, 3e-3, tick)
    return right(model, *pairs(512, distance, generator))


def classifier(kind: str, classes: int, channels: int) -> nn.Module:
    """Return a small VAN with an arm; `blind` has a wider MLP, so that all have as many parameters."""
    dims = CLASSIFIER["widths"]
    weights = sum(size * size for size in (5, 7)) + 2
    wider = [weights * dim / (2 * dim + 11) / dim if kind == "blind" else 0.0 for dim in dims]
    ratios = [ratio + more for ratio, more in zip(CLASSIFIER["mlp_ratios"], wider, strict=True)]
    options = {**CLASSIFIER, "mlp_ratios": ratios}
    model = image_model("van-small", **options, num_labels=classes, num_channels=channels)
    for block in gated(model):
        block.attn.spatial_gating_unit = gate(kind, block.dim)
    return model


def gated(model: nn.Module) -> list[Any]:
    """Return the blocks of a model whose gate an arm may take the place of."""
    return [block for block in model.modules() if isinstance(block, LKABlock)]


def of_textures(kind: str, given: Images, seed: int, steps: int, tick: Any) -> tuple[float, int]:
    """Train an arm on textures; return its accuracy on those held out, and how many parameters it has."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, rest = (normalized(part, *given.statistics()) for part in (given.train, given.held_out))

    def batch() -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(images), (32,), generator=generator)
        return images[chosen], given.train_labels[chosen]

    model = classifier(kind, len(given.classes), given.channels)
    count = sum(p.numel() for p in model.parameters())
    return right(trained(model, batch, steps, 3e-3, tick), rest, given.held_out_labels), count


def decomposed() -> dict[str, float]:
    """Return how far the two convolutions are from the one they compose, inside and at the border."""
    layer = LargeKernelAttention(4, dtype=torch.float64)
    with torch.no_grad():
        layer.conv0.bias.zero_()
    first, second = layer.conv0.weight, layer.conv_spatial.weight
    spread = torch.zeros(4, 1, 19, 19, dtype=torch.float64)
    spread[:, :, ::3, ::3] = second.detach()
    whole = F.conv2d(spread.transpose(0, 1), first.flip(2, 3), padding=4, groups=4).transpose(0, 1)
    x = torch.randn(1, 4, 50, 50, dtype=torch.float64)
    with torch.no_grad():
        wide = F.conv2d(x, whole, layer.conv_spatial.bias, padding=11, groups=4)
        found = depthwise(x, first)
        found = depthwise(found, second, layer.conv_spatial.bias, dilation=3)
    off = (found - wide).abs()
    inside = float(off[:, :, 11:-11, 11:-11].max())
    return {"inside": inside, "border": float(off.max())}


def reached(kind: str) -> int:
    """Return how many positions along a row move one number of the gate."""
    layer = gate(kind, 2)
    x = torch.randn(1, 2, 61, 61).requires_grad_()
    layer(x)[0, 0, 30, 30].backward()
    assert x.grad is not None
    moved = (x.grad[0, 0] != 0).any(0).nonzero()[:, 0]
    return int(moved.max() - moved.min()) + 1


def operator_moved(kind: str) -> float:
    """Return how far the Jacobian at one input is from that at another."""
    layer = gate(kind, 2).double()
    inputs = torch.randn(2, 1, 2, 9, 9, dtype=torch.float64)
    one, two = (torch.autograd.functional.jacobian(layer, x) for x in inputs)
    return float((one - two).abs().max())


def ways(side: int) -> dict[str, Callable[[], Any]]:
    """Return large-kernel attention of a map [1, 16, side, side], and softmax attention of its positions."""
    layer, x = LargeKernelAttention(WIDTH), torch.randn(1, WIDTH, side, side)
    flat = x.flatten(2).mT[:, None].contiguous()

    def gated() -> None:
        with torch.no_grad():
            layer(x)

    return {"gated": gated, "dense": lambda: F.scaled_dot_product_attention(flat, flat, flat)}


def exponents(times: dict[str, Sequence[float]], way: str) -> list[float]:
    """Return the slope of log time over log pixels, by least squares, of every round."""
    took = {int(name.split()[1]): seconds for name, seconds in times.items() if name.startswith(f"{way} ")}
    x = torch.tensor([2.0 * side for side in took]).log() * 2
    x = x - x.mean()
    logs = torch.tensor(list(took.values()), dtype=torch.float64).log()
    return [float(slope) for slope in (x[:, None] * logs).sum(0) / x.square().sum()]
