"""A differentiable bias on the scores, before the softmax.

    scores'[b, h, i, j] = scores[b, h, i, j] + bias[h, j]

The same for every query row i; keys that are not chosen have a bias of 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.engines.rows import RowBlock
from regard.errors import RegardError, ShapeMismatch
from regard.runtime.edits import targets
from regard.runtime.edits.targets import Layer
from regard.runtime.protocol import Edit, Wanted
from regard.runtime.spans import span_of_keys

if TYPE_CHECKING:
    from regard.runtime.anatomy import Anatomy
    from regard.runtime.call import Call

Bias = Tensor | float


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreBias(Edit):
    """Add a bias to the scores of some keys; gradients reach it.

    Which keys: those at `positions`, those of the span `span`, or, with neither, the keys at positions
    0 to n - 1 of a bias [H', n]. Other keys are left as they are.

    Attributes:
        bias: a number or a tensor [], [H'] (one for all chosen keys) or [H', n] (one for each of n
            positions), or a mapping from layer to these, for a bias of its own in every layer. H' is
            the number of `heads`, or 1. Finite: to hide a key, use a large negative number.
        layers: numbers in the main stack, or aliases; default all of the main stack. Not with a mapping.
        heads: query heads, the same in every layer; default all.
        positions: absolute key positions, the first real token 0. Not with `span`.
        span: name of a span of the run, given as `spans=` to `steer` or `watch`.

    Raises:
        RegardError: for contradictory options, and a bias that would shift whole rows, which the
            softmax undoes; when run, where the run has no such span.
        ShapeMismatch: for a bias of another shape.
        NoSuchSite: when a session is made, for a layer or head that is not there.

    Example:
        >>> first = torch.nn.Parameter(torch.zeros(9))
        >>> edit = ScoreBias(first, layers=[5], positions=[0])
    """

    bias: Bias | Mapping[Layer, Bias] = field(kw_only=False)
    layers: Sequence[Layer] | None = None
    heads: Sequence[int] | None = None
    positions: Sequence[int] | None = None
    span: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.bias, Mapping) and (self.layers is not None or not self.bias):
            raise RegardError("a mapping from layer to bias names the layers itself: leave layers= out.")
        if self.positions is not None and self.span is not None:
            raise RegardError("positions and span are both given; choose the keys by one of them.")
        if self.positions is not None:
            numbers = list(self.positions)
            if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
                raise RegardError(f"positions is {numbers}; give different positions, from 0 on.")
        for bias in self.bias.values() if isinstance(self.bias, Mapping) else [self.bias]:
            self._check_bias(bias)

    def _check_bias(self, bias: Bias) -> None:
        if not isinstance(bias, Tensor | float | int):
            raise RegardError(f"the bias is a {type(bias).__name__}; it must be a number or a tensor.")
        shape = tuple(bias.shape) if isinstance(bias, Tensor) else ()
        if len(shape) > 2:
            raise ShapeMismatch(f"the bias has shape {shape}; it must be [], [H'] or [H', n].")
        if len(shape) < 2 and self.positions is None and self.span is None:
            raise RegardError(
                f"a bias of shape {shape} on every key shifts whole rows, which the softmax undoes; choose "
                "keys by positions= or span=, or give a bias [H', n]."
            )
        if len(shape) == 2 and self.span is not None:
            raise ShapeMismatch(f"the bias has shape {shape}; for a span it must be [] or [H'].")
        if len(shape) == 2 and self.positions is not None and shape[1] != len(self.positions):
            raise ShapeMismatch(f"the bias has shape {shape}, for {len(self.positions)} positions.")
        if self.heads is not None and shape and shape[0] not in (1, len(self.heads)):
            raise ShapeMismatch(f"the bias has shape {shape}, for {len(self.heads)} heads.")
        if not bool(torch.isfinite(torch.as_tensor(bias)).all()):
            raise RegardError("the bias must be finite; to hide a key, use a large negative number.")

    def check(self, anatomy: Anatomy) -> None:
        """Refuse layers and heads that the model does not have, and a bias for another number of heads."""
        layers = list(self.bias) if isinstance(self.bias, Mapping) else self.layers
        targets.check_layers(layers, self.heads, anatomy, "ScoreBias")

    def named(self, anatomy: Anatomy) -> list[str]:
        """Return the aliases of the layers that are given."""
        layers = self.bias if isinstance(self.bias, Mapping) else self.layers or ()
        return targets.named_layers(layers, anatomy)

    def _bias_of(self, call: Call) -> Bias | None:
        if isinstance(self.bias, Mapping):
            found = (b for layer, b in self.bias.items() if call.site.named(layer, call.main))
            return next(found, None)
        return self.bias if targets.layer_here(call, self.layers) else None

    def wants(self, call: Call) -> Wanted | None:
        if self._bias_of(call) is None:
            return None
        return Wanted(heads=None if self.heads is None else targets.within(call, self.heads))

    def scores(self, block: RowBlock) -> Tensor:
        where = targets.columns(block, self.heads)
        old = targets.pick(block.scores, where)
        bias = self._bias_of(block.call)
        assert bias is not None
        bias = torch.as_tensor(bias, device=old.device).to(old.dtype)
        if bias.ndim and bias.shape[0] not in (1, old.shape[1]):
            raise ShapeMismatch(
                f"the bias has shape {tuple(bias.shape)}, and {block.site.alias} has {old.shape[1]} heads."
            )
        return targets.put(block.scores, where, old + self._by_key(bias, block))

    def _by_key(self, bias: Tensor, block: RowBlock) -> Tensor:
        """The bias of every key of the block, [B|1, H'|1, 1, K]."""
        if self.span is not None:
            keys = span_of_keys(block, self.span)
            return bias.reshape(1, -1, 1, 1) * keys[:, None, None, :]
        positions = self.positions if self.positions is not None else range(bias.shape[1])
        wanted = torch.tensor(list(positions), device=block.key_positions.device)
        match = block.key_positions[:, :, None] == wanted  # [B|1, K, n]
        if block.valid_keys is not None:
            match = match & block.valid_keys[:, :, None]
        each = bias.expand(bias.shape[0], len(wanted)) if bias.ndim == 2 else None
        if each is None:
            return bias.reshape(1, -1, 1, 1) * match.any(-1)[:, None, None, :]
        return torch.einsum("hn,bkn->bhk", each, match.to(each.dtype))[:, :, None]
