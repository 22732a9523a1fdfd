"""What a replay has recorded of a forward, and how its inputs and outputs are repeated in a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regard.errors import RegardError, UnsupportedModel
from regard.runtime.driving import BATCHED
from regard.runtime.prefix import FixedCache

NOT_BATCHED = ("logits_to_keep", "cache_position")


def refuse_unfit(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Refuse what cannot be replayed: encoder-decoders, training mode, inputs with a cache."""
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModel(f"{name} is an encoder-decoder, which cannot be replayed from a layer on.")
    if any(module.training for module in model.modules()):
        raise RegardError(f"{name} is in training mode, where dropout differs each time; call eval() first.")
    if not isinstance(inputs.get("past_key_values"), FixedCache | None):
        raise RegardError("The inputs bring a cache, and a replay has none; feed all tokens at once.")
    sequences_in(inputs)


def sequences_in(inputs: Mapping[str, Any]) -> int:
    """Return the batch size B of the inputs of a forward."""
    found = next((x for n in BATCHED if isinstance(x := inputs.get(n), Tensor)), None)
    if found is None:
        raise RegardError(
            f"The inputs have none of {', '.join(BATCHED)}; found {', '.join(inputs) or 'none'}."
        )
    return found.shape[0]


def kept(output: Any, name: str) -> Any:
    """Return a copy of what a block gave: a tensor, or a tuple of one and what goes along with it.

    Args:
        output: what the block returned.
        name: the block's, for the message.

    Raises:
        UnsupportedModel: for anything else.
    """
    first = output[0] if isinstance(output, tuple) and output else output
    rest = output[1:] if isinstance(output, tuple) else ()
    fits = isinstance(first, Tensor) and first.ndim >= 2
    if not fits or any(not _goes_along(x, first) for x in rest):
        found = [type(x).__name__ for x in output] if isinstance(output, tuple) else type(output).__name__
        raise UnsupportedModel(f"The block {name} returns {found}, which is not understood as hidden states.")
    if not isinstance(output, tuple):
        return first.detach().clone()
    return tuple(x.detach().clone() if isinstance(x, Tensor) else x for x in output)


def _goes_along(x: Any, hidden: Tensor) -> bool:
    return x is None or (isinstance(x, Tensor) and x.ndim > 0 and x.shape[0] == hidden.shape[0])


def again(output: Any, times: int) -> Any:
    """Return a recorded output `times` times over; a copy, as a model may write into it."""
    if isinstance(output, Tensor):
        return torch.cat([output] * times)
    return tuple(again(x, times) if isinstance(x, Tensor) else x for x in output)


def tile(x: Tensor, times: int, dim: int = 0) -> Tensor:
    """Return `x` repeated `times` times along a dimension, `x` itself for once."""
    return x if times == 1 else torch.cat([x] * times, dim)


def logits_of(model: nn.Module, output: Any) -> Tensor:
    """Return the logits [B, T, V] of a forward, or the last hidden state [B, T, D] where there are none."""
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(output, name, None), Tensor):
            return found
    raise UnsupportedModel(f"{type(model).__name__} returned neither logits nor last_hidden_state.")


def repeated(inputs: Mapping[str, Any], times: int) -> dict[str, Any]:
    """Return the inputs of a forward with the batch `times` over, sequence b in the rows `r * B + b`.

    What lies along the first dimension is repeated, also patches of images that stand in one row. Of
    rotary positions in three parts, [3, B, T], that is the second dimension; what is one for all
    sequences stays so.
    """
    if times == 1:
        return dict(inputs)
    count = sequences_in(inputs)
    return {k: v if k in NOT_BATCHED else _repeat(k, v, times, count) for k, v in inputs.items()}


def _repeat(name: str, x: Any, times: int, sequences: int) -> Any:
    if isinstance(x, FixedCache):
        return x.repeated(times)
    if isinstance(x, Mapping):
        return {k: _repeat(k, v, times, sequences) for k, v in x.items()}
    if not isinstance(x, Tensor) or not x.ndim:
        return x
    if name == "position_ids" and x.ndim == 3:
        return tile(x, times, 1)
    return x if x.shape[0] == 1 != sequences else tile(x, times)
