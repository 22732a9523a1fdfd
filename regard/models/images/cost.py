"""Parameters and operations of a model of images, as papers count them.

Operations are multiply-adds of convolutions, matrix products and attention (q k^T and weights times v) for
one image, by `torch.utils.flop_counter`, halved; norms, activations and other element-wise work is left out.

The model is copied without its numbers (to the meta device) and run there, attention as two products, since
the counter does not know the fused attention of a CPU. A module with a method `multiply_adds(x) -> int` says
itself what its whole forward on x costs: one whose fast path computes more than the algorithm asks (windows
that overlap), less visibly, or with numbers taken out of tensors. It then runs by its `reference`, if it has
one.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from regard.errors import RegardError


@dataclass(frozen=True)
class Cost:
    """What a model has and does.

    Attributes:
        parameters: numbers in it that can be trained, each counted once.
        multiply_adds: of convolutions, matrix products and attention, for one image.
        image_size: height and width of that image.
    """

    parameters: int
    multiply_adds: int
    image_size: tuple[int, int]

    def __str__(self) -> str:
        height, width = self.image_size
        return (
            f"{short(self.parameters)} parameters, {short(self.multiply_adds)} multiply-adds "
            f"at {height} x {width}"
        )


def cost(
    model: nn.Module, image_size: int | tuple[int, int] | None = None, channels: int | None = None
) -> Cost:
    """Return parameters and operations of a model for one image; the model is not touched.

    Args:
        model: an `ImageModel`, or any module of images [B, channels, height, width]; on any device.
        image_size: height and width, or one number for both; by default that of the model's config, or 224.
        channels: of the image; by default those of the model's config, or 3.

    Raises:
        RegardError: where the image is none, or not one that the model takes.

    Example:
        >>> str(cost(nn.Conv2d(3, 8, 3, padding=1, bias=False), 32))
        '216 parameters, 221 k multiply-adds at 32 x 32'
    """
    if image_size is None:
        image_size = getattr(getattr(model, "config", None), "image_size", None) or 224
    image_size = tuple(image_size) if isinstance(image_size, list) else image_size
    height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in (height, width)):
        raise RegardError(f"image_size is {image_size!r}; it must be one or two whole numbers from 1.")
    if channels is None:
        channels = int(getattr(getattr(model, "config", None), "num_channels", 3))
    hollow = _hollow(model).eval()
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    image = torch.empty(1, channels, height, width, device="meta", dtype=dtype)
    counter = FlopCounterMode(display=False)
    told = _Told(counter, hollow)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        hollow(image)
    trained = sum(p.numel() for p in model.parameters())
    return Cost(trained, counter.get_total_flops() // 2 + told.more, (height, width))


def short(count: int) -> str:
    """Return a count in three figures, as papers print it.

    Example:
        >>> short(4_105_800), short(880_000_000), short(12)
        ('4.11 M', '880 M', '12')
    """
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:#.3g}".rstrip(".") + f" {unit}"
    return str(count)


def _hollow(model: nn.Module) -> Any:
    """A copy whose parameters and buffers have shapes alone."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(model, memo)


class _Told:
    """Puts what modules say of themselves in the place of what the counter saw in them."""

    def __init__(self, counter: FlopCounterMode, model: nn.Module) -> None:
        self.counter, self.more, self._seen = counter, 0, 0
        self._inside: list[nn.Module] = []
        for module in model.modules():
            if callable(getattr(module, "multiply_adds", None)):
                module.register_forward_pre_hook(self._before)
                module.register_forward_hook(self._after)
                definition: Any = getattr(module, "reference", None)
                if callable(definition):
                    module.forward = definition

    def _before(self, module: Any, given: Any) -> None:
        if not self._inside:
            self._seen = self.counter.get_total_flops()
        self._inside.append(module)

    def _after(self, module: Any, given: Any, out: Any) -> None:
        self._inside.pop()
        if not self._inside:
            self.more += int(module.multiply_adds(*given))
            self.more -= (self.counter.get_total_flops() - self._seen) // 2
