"""The network that a memory is, M(k) = act(.. act(k W_1) ..) W_L, and the gradient of its loss by hand.

With h_0 = k, a_l = h_{l-1} W_l, h_l = act(a_l) and the loss |a_L - v|^2, the gradient of W_l from one
position is the outer product of h_{l-1} and d_l:

    d_L = 2 (a_L - v),   d_{l-1} = (d_l W_l^T) * act'(a_{l-1})

so a position is kept as two vectors a layer, and no gradient of the size of the weights is ever formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = tuple[Tensor, ...]


def _silu_slope(a: Tensor) -> Tensor:
    s = a.sigmoid()
    return s * (1 + a * (1 - s))


def _gelu_slope(a: Tensor) -> Tensor:
    normal = torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(a / math.sqrt(2))) + a * normal


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "silu": (F.silu, _silu_slope),
    "gelu": (F.gelu, _gelu_slope),
}


def apply(weights: Weights, x: Tensor, activation: str = "silu") -> Tensor:
    """Return M(x).

    Args:
        weights: one tensor a layer, each [..., in, out].
        x: [..., T, in].
        activation: between layers, one of `ACTIVATIONS`.
    """
    act = ACTIVATIONS[activation][0]
    for number, weight in enumerate(weights):
        x = (act(x) if number else x) @ weight
    return x


def gradient(weights: Weights, k: Tensor, v: Tensor, activation: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return h_{l-1} and d_l of every layer, [..., T, in] and [..., T, out]."""
    act, slope = ACTIVATIONS[activation]
    before, inputs = [], [k]
    for weight in weights:
        before.append(inputs[-1] @ weight)
        inputs.append(act(before[-1]))
    deltas = [2 * (before[-1] - v)]
    for weight, a in zip(weights[:0:-1], before[-2::-1], strict=True):
        deltas.append((deltas[-1] @ weight.mT) * slope(a))
    return inputs[:-1], deltas[::-1]
