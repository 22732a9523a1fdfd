"""Subspace attention of a map x [B, C, H, W] in g groups of G = C / g channels, channels first.

    h = relu(BN(c_c x + b_c))                       a scale and a bias a channel, "depthwise 1 x 1"
    l_n = relu(BN(w_n . maxpool_3x3(h_n) + b_n))    one number a position and group n
    A_n = softmax over the H W positions of l_n     [B, g, H, W]
    out_n = A_n * x_n + x_n

5 C + 3 g parameters; 2 C with `norm=False`, without norms, relu and biases, as in the paper's formula.
A sums to 1, so that the factor 1 + A is near 1 on a large map, and what relu cuts has no gradient.

Source: Saini et al., 2020, arXiv 2006.15102, section 3. Status: agrees with the official code by running both
in evaluation and training; `norm=False` is the paper only; `final_relu`, `temperature`, `factor` and
`weights` are ours. The official code gives torch's norms a momentum of 0.9, which keeps a tenth of the old
statistics, and was likely meant as 0.1, the default here. All groups are computed at once, on a CPU with
channels last in memory, in which the result is returned; a max-pool is 10 times as fast there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.attention.block import Block, Maps
from regard.attention.checks import check_positive, check_statistics
from regard.attention.costs import Costs
from regard.attention.registry import Spec, mechanism
from regard.errors import RegardError, ShapeMismatch

WEIGHTS = ("softmax", "sigmoid")
FACTORS = ("residual", "mean")


class ULSAM(Block):
    """Subspace attention; the module of `Subspaces`.

    Args:
        channels: of x.
        groups: of channels with a map each; they divide `channels`.
        norm: whether there are batch norms, relu and biases, as in the official code.
        final_relu: whether what the softmax takes is cut at 0, where there are norms.
        temperature: what goes into the softmax is divided by it.
        weights: "softmax" over positions, or "sigmoid" at each.
        factor: "residual" for 1 + A, or "mean" for 1 + H W A, whose second part has mean 1.
        momentum: of the norms, as torch has it; 0.9 in the official code.
        device, dtype: of the parameters.

    Raises:
        RegardError: where the numbers do not fit together.

    Example:
        >>> layer = ULSAM(64, groups=4)
        >>> x = torch.randn(2, 64, 14, 14)
        >>> layer(x).shape, layer.attention(x).shape, sum(p.numel() for p in layer.parameters())
        (torch.Size([2, 64, 14, 14]), torch.Size([2, 4, 14, 14]), 332)
    """

    exempt: ClassVar = {"batch": "batch normalisation in training takes mean and variance over the batch"}
    shows = "maps"

    def __init__(
        self, channels: int, groups: int = 4, norm: bool = True, final_relu: bool = True,
        temperature: float = 1.0, weights: str = "softmax", factor: str = "residual", momentum: float = 0.1,
        *, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        _check(channels, groups, temperature, weights, factor, momentum)
        self.channels, self.groups, self.norm = channels, groups, norm
        self.final_relu, self.temperature, self.weights, self.factor = (
            final_relu,
            temperature,
            weights,
            factor,
        )
        made = {"device": device, "dtype": dtype}
        self.conv_dws = nn.Conv2d(channels, channels, 1, groups=channels, bias=norm, **made)
        self.conv_point = nn.Conv2d(channels, groups, 1, groups=groups, bias=norm, **made)
        self.bn_dws = nn.BatchNorm2d(channels, momentum=momentum, **made) if norm else None
        self.bn_point = nn.BatchNorm2d(groups, momentum=momentum, **made) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighted map, of the shape of x [B, channels, H, W].

        Raises:
            ShapeMismatch: where x is of another shape.
            RegardError: in training, where a group has one logit in all, which has no variance.
        """
        attention = self.attention(x)
        if self.factor == "mean":
            attention = attention * math.prod(x.shape[2:])
        parts = self._last(x).unflatten(1, (self.groups, -1))
        return torch.addcmul(parts, parts, attention.to(x.dtype)[:, :, None]).flatten(1, 2)

    def attention(self, x: Tensor) -> Tensor:
        """Return the weights A of every group, [B, groups, H, W], float32 where x is in half precision."""
        self._fits(x)
        pooled = F.max_pool2d(self._scaled(self._last(x)), 3, stride=1, padding=1)
        logits = self.conv_point(pooled)
        if self.bn_point is not None:
            logits = self.bn_point(logits)
        return self._weighted(logits)

    def maps(self, x: Tensor) -> Maps:
        """Return the weights of every group."""
        kind = "probability" if self.weights == "softmax" else "factor"
        return Maps(self.attention(x), kind, "group")

    def reference(self, x: Tensor) -> Tensor:
        """Return the same group by group, as the paper and the official code have it."""
        self._fits(x)
        return torch.cat([self._group(part, n) for n, part in enumerate(x.chunk(self.groups, 1))], 1)

    def extra_repr(self) -> str:
        told = f"{self.channels}, groups={self.groups}, norm={self.norm}"
        return f"{told}, weights={self.weights!r}, factor={self.factor!r}"

    def example(self, generator: torch.Generator) -> Tensor:
        return torch.randn(2, self.channels, 5, 6, generator=generator, dtype=torch.float64)

    def _scaled(self, x: Tensor) -> Tensor:
        """What is pooled; in evaluation without gradients scale and norm are one scale and shift."""
        scale, norm = self.conv_dws.weight, self.bn_dws
        if norm is None:
            return x * scale.view(-1, 1, 1)
        if norm.training or torch.is_grad_enabled():
            bias = self.conv_dws.bias
            assert bias is not None
            return F.relu(norm(torch.addcmul(bias.view(-1, 1, 1), x, scale.view(-1, 1, 1))))
        mean, variance, bias = norm.running_mean, norm.running_var, self.conv_dws.bias
        assert mean is not None and variance is not None and bias is not None
        rate = norm.weight / (variance + norm.eps).sqrt()
        shift, scale = norm.bias + rate * (bias - mean), rate * scale.flatten()
        return torch.addcmul(shift.view(-1, 1, 1), x, scale.view(-1, 1, 1)).relu_()

    def _weighted(self, logits: Tensor) -> Tensor:
        if self.norm and self.final_relu:
            logits = F.relu(logits)
        wide = logits.double() if logits.dtype == torch.float64 else logits.float()
        wide = wide / self.temperature
        if self.weights == "sigmoid":
            return wide.sigmoid()
        return wide.flatten(2).softmax(2).view(wide.shape)

    def _group(self, x: Tensor, number: int) -> Tensor:
        size = self.channels // self.groups
        part = slice(number * size, (number + 1) * size)
        h = F.conv2d(x, self.conv_dws.weight[part], _of(self.conv_dws.bias, part), groups=size)
        h = h if self.bn_dws is None else F.relu(_normed(h, self.bn_dws, part))
        h = F.max_pool2d(h, 3, stride=1, padding=1)
        one = slice(number, number + 1)
        logits = F.conv2d(h, self.conv_point.weight[one], _of(self.conv_point.bias, one))
        logits = logits if self.bn_point is None else _normed(logits, self.bn_point, one)
        attention = self._weighted(logits)
        if self.factor == "mean":
            attention = attention * math.prod(x.shape[2:])
        return attention.to(x.dtype) * x + x

    def _last(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return x
        return x.contiguous(memory_format=torch.channels_last)

    def _fits(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.channels or not x.is_floating_point():
            raise ShapeMismatch(
                f"x must be floating-point [batch, {self.channels}, height, width], and is {list(x.shape)}."
            )
        if self.training and self.norm:
            check_statistics(x)


def _normed(x: Tensor, norm: nn.BatchNorm2d, part: slice) -> Tensor:
    """The norm of some channels; statistics are not kept."""
    scale, shift = norm.weight[part], norm.bias[part]
    if norm.training:
        return F.batch_norm(x, None, None, scale, shift, training=True, eps=norm.eps)
    mean, variance = _of(norm.running_mean, part), _of(norm.running_var, part)
    return F.batch_norm(x, mean, variance, scale, shift, eps=norm.eps)


def _of(x: Tensor | None, part: slice) -> Tensor | None:
    return None if x is None else x[part]


def fused_weights(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Return the weights of the official `ULSAM`, one module a group, as those of ours.

    Args:
        state: its `state_dict()`, or one that holds it under `prefix`.
        prefix: how its names begin, such as `"features.13."`.

    Raises:
        RegardError: where there is no group there.

    Example:
        >>> one = {"conv_dws.weight": torch.ones(2, 1, 1, 1), "conv_point.weight": torch.ones(1, 2, 1, 1)}
        >>> both = {f"subspaces.{n}.{k}": x for n in range(3) for k, x in one.items()}
        >>> {k: list(x.shape) for k, x in fused_weights(both).items()}
        {'conv_dws.weight': [6, 1, 1, 1], 'conv_point.weight': [3, 2, 1, 1]}
    """
    stem = f"{prefix}subspaces."
    first = [name.removeprefix(f"{stem}0.") for name in state if name.startswith(f"{stem}0.")]
    if not first:
        raise RegardError(f"the weights have no {stem}0; they are not those of the official ULSAM.")
    groups = len({name.removeprefix(stem).split(".")[0] for name in state if name.startswith(stem)})
    found = {}
    for name in first:
        parts = [state[f"{stem}{number}.{name}"] for number in range(groups)]
        found[name] = parts[0] if parts[0].ndim == 0 else torch.cat(parts)
    return found


def _check(channels: Any, groups: Any, temperature: Any, weights: Any, factor: Any, momentum: Any) -> None:
    for name, value in (("channels", channels), ("groups", groups)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise RegardError(f"{name} is {value!r}; it must be a whole number from 1.")
    if channels % groups:
        divisors = [str(n) for n in range(1, channels + 1) if channels % n == 0]
        raise RegardError(
            f"{groups} groups do not divide {channels} channels; what does is {', '.join(divisors)}."
        )
    check_positive("temperature", temperature)
    for name, value, known in (("weights", weights, WEIGHTS), ("factor", factor, FACTORS)):
        if value not in known:
            raise RegardError(f"{name} is {value!r}; it must be {' or '.join(known)}.")
    if isinstance(momentum, bool) or not isinstance(momentum, int | float) or not 0 < momentum <= 1:
        raise RegardError(f"momentum is {momentum!r}; it must be above 0 and at most 1.")


@mechanism("ulsam")
@dataclass(frozen=True, kw_only=True)
class Subspaces(Spec):
    """Subspace attention: each group of channels of a map is weighted by a softmax over its positions.

    Attributes:
        channels: of x, which are its dimension 1.
        groups: of channels with a map each.
        norm, final_relu, temperature, weights, factor, momentum: see `ULSAM`.

    Example:
        >>> Subspaces(channels=8, groups=2).build()(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    module: ClassVar = ULSAM
    costs: ClassVar = Costs(time="T D", memory="T D")
    channels: int
    groups: int = 4
    norm: bool = True
    final_relu: bool = True
    temperature: float = 1.0
    weights: str = "softmax"
    factor: str = "residual"
    momentum: float = 0.1

    def __post_init__(self) -> None:
        _check(self.channels, self.groups, self.temperature, self.weights, self.factor, self.momentum)

    @classmethod
    def examples(cls) -> tuple[Spec, ...]:
        return (
            cls(channels=8),
            cls(channels=6, groups=1, temperature=0.5),
            cls(channels=6, groups=3, final_relu=False, factor="mean"),
            cls(channels=4, groups=2, weights="sigmoid"),
        )
