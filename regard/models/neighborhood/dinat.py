"""Make transformers' DiNAT work, with no natten or beside a new one that lacks what it imports.

transformers imports `natten2dqkrpb` and `natten2dav`, which natten dropped in 0.20, so its models cannot be
built, and beside such a natten not even imported. Its attention also swaps columns of the map with rows, and
never moves the heads to the front (read in 5.23). `serve_dinat` puts `na2d` in the place of that attention,
and ours in the place of the two functions.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from regard.attention.neighborhood import na2d, natten2dav, natten2dqkrpb

FUNCTIONS = {"natten2dqkrpb": natten2dqkrpb, "natten2dav": natten2dav}
MODULE = "transformers.models.dinat.modeling_dinat"


class Served:
    """What was changed in transformers and natten; `remove()`, or leaving a `with` block, undoes it."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute, and remember what it was."""
        self._before.append((owner, name, getattr(owner, name, self)))
        setattr(owner, name, value)

    def remove(self) -> None:
        """Set everything back."""
        while self._before:
            owner, name, value = self._before.pop()
            if value is self:
                delattr(owner, name)
            else:
                setattr(owner, name, value)

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def serve_dinat() -> Served:
    """Give transformers' DiNAT models a working neighbourhood attention, from now on.

    Returns:
        A handle that undoes it with `remove()` or at the end of a `with` block; models that were built
        compute with ours until then.

    Example:
        >>> from transformers import DinatConfig, DinatForImageClassification
        >>> sizes = dict(embed_dim=16, depths=[1, 1], num_heads=[2, 4], kernel_size=3, dilations=[[1], [2]])
        >>> with serve_dinat(), torch.no_grad():
        ...     model = DinatForImageClassification(DinatConfig(**sizes))
        ...     model(torch.randn(1, 3, 32, 32)).logits.shape
        torch.Size([1, 2])
    """
    served = Served()
    if importlib.util.find_spec("natten") is not None:
        natten = importlib.import_module("natten.functional")
        for name, function in FUNCTIONS.items():
            if not hasattr(natten, name):
                served.set(natten, name, function)
    dinat = importlib.import_module(MODULE)
    for name, function in FUNCTIONS.items():
        served.set(dinat, name, function)
    required = dinat.requires_backends

    def requires_backends(owner: Any, backends: Any) -> None:
        required(owner, [name for name in backends if name != "natten"])

    served.set(dinat, "requires_backends", requires_backends)
    served.set(dinat.NeighborhoodAttention, "forward", _forward)
    return served


def _forward(layer: Any, hidden_states: Tensor, output_attentions: bool | None = False) -> tuple[Tensor, ...]:
    """The output [B, H, W, dim] of a layer, and its weights [B, heads, H, W, k^2] where asked for."""
    heads = (layer.num_attention_heads, layer.attention_head_size)
    q, k, v = (part(hidden_states).unflatten(-1, heads) for part in (layer.query, layer.key, layer.value))
    size, dilation = layer.kernel_size, layer.dilation
    if not output_attentions and not (layer.training and layer.dropout.p):
        return (na2d(q, k, v, size, dilation=dilation, rpb=layer.rpb).flatten(-2),)
    q, k, v = (x.movedim(3, 1) for x in (q, k, v))
    scores = natten2dqkrpb(q * q.shape[-1] ** -0.5, k, layer.rpb, size, dilation)
    weights = layer.dropout(torch.softmax(scores, -1))
    out = natten2dav(weights, v, size, dilation).movedim(1, 3).flatten(-2)
    return (out, weights) if output_attentions else (out,)
