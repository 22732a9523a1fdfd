"""Depthwise convolution that keeps the size, with dilation, in one to three axes, forward and backward.

    out[b, c, p] = bias[c] + sum_t weight[c, 0, t] x[b, c, p + dilation t - before],   x = 0 outside
    before = dilation (k - 1) div 2 along an axis of k taps; what an even kernel has more stands after

On a CPU oneDNN's fast kernel is for float32 planes with little padding along the last axis, and forward
alone; what else is asked of it, dilated kernels above all, takes 10 to 20 times as long. So the last axis is
padded beforehand, half precision computes in float32, and a third axis is a sum of convolutions of planes.
The gradient of x is such a convolution with the kernel flipped, that of the kernel a product of matrices, of
pieces of rows with the stretches that their taps reach. On other devices it is torch's own convolution.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
PADDED_INSIDE = 3
PIECE = 14
Sides = tuple[int, int]


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dilation: int = 1) -> Tensor:
    """Return the convolution of every channel with its own kernel, of the shape and dtype of x.

    Args:
        x: [B, C, X1..], of one to three axes.
        weight: [C, 1, k1..], in the dtype of x.
        bias: [C], or None.
        dilation: distance between taps along every axis.
    """
    if x.device.type != "cpu":
        return _whole(x, weight, bias, dilation)
    if x.dtype in (torch.float16, torch.bfloat16):
        weight, bias = weight.float(), None if bias is None else bias.float()
        return depthwise(x.float(), weight, bias, dilation=dilation).to(x.dtype)
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return depthwise(x, weight, bias, dilation=dilation)
    if x.ndim == 3:
        return _of_planes(x[:, :, None], weight[:, :, None], bias, dilation)[:, :, 0]
    return (_of_planes if x.ndim == 4 else _of_volumes)(x, weight, bias, dilation)


def before(taps: int, dilation: int) -> int:
    """Return how far the first tap stands before its output.

    Example:
        >>> before(7, 3), before(4, 3)
        (9, 4)
    """
    return dilation * (taps - 1) // 2


def _whole(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """By torch's own convolution."""
    padding = []
    for taps in reversed(weight.shape[2:]):
        first = before(taps, dilation)
        padding += [first, dilation * (taps - 1) - first]
    inside: Any = [first for first in padding[::2]][::-1]
    if padding[::2] != padding[1::2]:
        x, inside = F.pad(x, padding), 0
    return CONVOLUTIONS[x.ndim - 2](x, weight, bias, padding=inside, dilation=dilation, groups=x.shape[1])


def _of_volumes(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """As the sum over taps along the first axis of convolutions of planes."""
    depth, taps = x.shape[2], weight.shape[2]
    planes = x.transpose(1, 2)
    out = None if bias is None else bias[:, None, None].expand(planes.shape)
    for tap in range(taps):
        shift = dilation * tap - before(taps, dilation)
        low, high = max(0, -shift), min(depth, depth - shift)
        if low < high:
            near = planes[:, low + shift : high + shift]
            found = _of_planes(near.flatten(0, 1), weight[:, :, tap], None, dilation).view(near.shape)
            found = F.pad(found, (0, 0, 0, 0, 0, 0, low, depth - high))
            out = found if out is None else out + found
    return planes.new_zeros(planes.shape).transpose(1, 2) if out is None else out.transpose(1, 2)


def _of_planes(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    first = before(weight.shape[2], dilation), before(weight.shape[3], dilation)
    if dilation == 1 or torch.compiler.is_compiling():
        return _convolved(x, weight, bias, dilation, first)
    out: Tensor = _Planes.apply(x, weight, bias, dilation, first)
    return out


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, first: Sides) -> Tensor:
    """The convolution of planes with `first` taps before each output."""
    last = _after(weight, dilation, first)
    rows, columns = first[0] == last[0], first[1] == last[1] <= PADDED_INSIDE
    padding = [0, 0] if columns else [first[1], last[1]]
    if not rows:
        padding += [first[0], last[0]]
    inside = first[0] if rows else 0, first[1] if columns else 0
    x = F.pad(x, padding) if any(padding) else x
    return F.conv2d(x, weight, bias, padding=inside, dilation=dilation, groups=x.shape[1])


def _after(weight: Tensor, dilation: int, first: Sides) -> Sides:
    spans = [dilation * (taps - 1) for taps in weight.shape[2:]]
    return spans[0] - first[0], spans[1] - first[1]


class _Planes(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, first: Sides) -> Tensor:
        return _convolved(x, weight, bias, dilation, first)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, weight, _, ctx.dilation, ctx.first = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        last = _after(weight, ctx.dilation, ctx.first)
        of_x = of_weight = None
        if needs_x:
            of_x = _Planes.apply(given, weight.flip(2, 3), None, ctx.dilation, last)
        if needs_weight:
            of_weight = _of_taps(given, x, weight, ctx.dilation, (ctx.first, last))
        return of_x, of_weight, given.sum((0, 2, 3)) if needs_bias else None, None, None


def _of_taps(given: Tensor, x: Tensor, weight: Tensor, dilation: int, sides: tuple[Sides, Sides]) -> Tensor:
    """The gradient of the kernels [C, 1, kh, kw]."""
    (top, left), (bottom, right) = sides
    given, x = given.contiguous(), x.contiguous()
    if min(weight.shape[2:]) < 5 or x.shape[3] < 2 * PIECE:
        mask = [False, True, False]
        padded = F.pad(x, (left, right, top, bottom))
        spread, groups = [dilation, dilation], weight.shape[0]
        found: Tensor = torch.ops.aten.convolution_backward(
            given, padded, weight, None, [1, 1], [0, 0], spread, False, [0, 0], groups, mask
        )[1]
        return found
    taps, pieces = weight.shape[2], -(-x.shape[3] // PIECE)
    short, reach = pieces * PIECE - x.shape[3], PIECE + left + right
    rows = F.pad(x, (left, right + short, top, bottom)).transpose(0, 1).unfold(-1, reach, PIECE)
    rows = rows.reshape(len(weight), -1, reach)
    given = F.pad(given, (0, short, 0, top + bottom)).transpose(0, 1).reshape(len(weight), -1, PIECE).mT
    count = given.shape[2] - (top + bottom) * pieces
    starts = (dilation * tap * pieces for tap in range(taps))
    met = torch.stack([given[:, :, :count] @ rows[:, start : start + count] for start in starts], 1)
    own = [met.diagonal(dilation * tap, 2, 3).sum(-1) for tap in range(weight.shape[3])]
    return torch.stack(own, -1)[:, None]
