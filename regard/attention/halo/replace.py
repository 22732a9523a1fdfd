"""Halo attention in the place of the 3 x 3 convolutions of a network, such as those of ResNet's bottlenecks.

Source: Vaswani et al., 2021, arXiv 2103.12731, section 2. Status: our choice of what is replaced.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from regard.attention.halo.layer import HaloAttention
from regard.attention.halo.rules import Numbers
from regard.errors import RegardError


def replace_conv3x3(
    module: nn.Module, *, block: Numbers = 8, halo: Numbers = 3, heads: int | None = None, dim_head: int = 16,
    border: str = "zero", pad: str = "auto", average: bool = False,
) -> list[str]:  # fmt: skip
    """Replace the 3 x 3 convolutions inside a module by halo attention with fresh weights, in place.

    Channels and stride stay; groups and the bias of the convolution go.

    Args:
        module: any that holds such convolutions (padding 1, dilation 1, stride 1 or 2), as a block of ResNet.
        block, halo: of the attention.
        heads: number of heads; by default as many as make values `dim_head` wide.
        dim_head: width of queries and keys of a head.
        border, pad, average: see `HaloAttention`.

    Returns:
        The names of the convolutions that were replaced.

    Raises:
        RegardError: where there is none, or one whose channels or stride the attention cannot have.

    Example:
        >>> from transformers.models.resnet.modeling_resnet import ResNetBottleNeckLayer
        >>> resnet = ResNetBottleNeckLayer(64, 128, stride=2)
        >>> replace_conv3x3(resnet, block=4, halo=1)
        ['layer.1.convolution']
    """
    found = {name: conv for name, conv in module.named_modules() if name and _is_conv3x3(conv)}
    if not found:
        raise RegardError(
            f"module is a {type(module).__name__} and holds no 3 x 3 convolution of padding 1 and dilation "
            "1; it must be the module around one."
        )
    made = {name: _attention(name, conv, block, halo, heads, dim_head, border, pad, average)
            for name, conv in found.items()}  # fmt: skip
    for name, attention in made.items():
        owner, _, last = name.rpartition(".")
        setattr(module.get_submodule(owner), last, attention)
    return list(made)


def _is_conv3x3(conv: nn.Module) -> bool:
    return (
        isinstance(conv, nn.Conv2d)
        and conv.kernel_size == (3, 3)
        and conv.padding in ((1, 1), "same")
        and conv.dilation == (1, 1)
    )


def _attention(
    name: str, conv: Any, block: Numbers, halo: Numbers, heads: int | None, dim_head: int, border: str,
    pad: str, average: bool,
) -> HaloAttention:  # fmt: skip
    if conv.stride[0] != conv.stride[1]:
        raise RegardError(f"{name} has stride {conv.stride}; it must be the same along both axes.")
    if heads is None and (dim_head < 1 or conv.out_channels % dim_head):
        raise RegardError(
            f"{name} has {conv.out_channels} channels, which heads of {dim_head} do not divide; give heads."
        )
    stride = int(conv.stride[0])
    attention = HaloAttention(
        conv.in_channels, conv.out_channels, heads or conv.out_channels // dim_head, block, halo,
        dim_head=dim_head, stride=stride, border=border, pad=pad, average=average and stride == 2,
        device=conv.weight.device, dtype=conv.weight.dtype,
    )  # fmt: skip
    return attention.train(conv.training)
