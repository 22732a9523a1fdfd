"""What a layer keeps between steps of decoding: keys and values, or the state of its mechanism."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from regard.errors import RegardError, ShapeMismatch


@dataclass(frozen=True, eq=False)
class DecodeState:
    """The state of one layer, batch first.

    Attributes:
        seen: int64 [B], how many valid positions were read.
        inner: keys and values so far, [B, Hkv, S, D], or what the mechanism carries.
        valid: bool [B, S], False at padding, where keys are kept and some are padding.
    """

    seen: Tensor
    inner: Any
    valid: Tensor | None = None

    def select(self, index: Tensor) -> DecodeState:
        """Return the state of sequences `index` int64 [N] of the batch, as beams need it."""
        chosen: DecodeState = _chosen(self, index)
        return chosen

    def numbers(self) -> int:
        """Return how many numbers it holds, besides the counts of positions and which are padding."""
        return _count(self.inner)


def _chosen(state: Any, index: Tensor) -> Any:
    if isinstance(state, Tensor):
        return state.index_select(0, index.to(state.device))
    if isinstance(state, tuple):
        parts = [_chosen(part, index) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    if is_dataclass(state) and not isinstance(state, type):
        return replace(state, **{f.name: _chosen(getattr(state, f.name), index) for f in fields(state)})
    return state


def _count(state: Any) -> int:
    if isinstance(state, Tensor):
        return state.numel()
    if isinstance(state, DecodeState):
        return state.numbers()
    if is_dataclass(state) and not isinstance(state, type):
        return sum(_count(getattr(state, f.name)) for f in fields(state))
    return sum(map(_count, state)) if isinstance(state, tuple) else 0


def check_state(state: Any, x: Tensor) -> None:
    """Refuse a state that is none, or is of another batch than x."""
    if state is None:
        return
    if not isinstance(state, DecodeState):
        raise RegardError(f"state must be what step() returned, and is of type {type(state).__name__}.")
    if state.seen.shape[0] != x.shape[0]:
        raise ShapeMismatch(
            f"the state is of {state.seen.shape[0]} sequences, and x of {x.shape[0]}; state.select(index) "
            "chooses among them."
        )


def positions_of(x: Tensor, valid: Tensor | None, state: DecodeState | None = None) -> Tensor:
    """Return the position of each token of x [B, T, ...], int64 [B|1, T]; padding counts for none."""
    if valid is None:
        at = torch.arange(x.shape[1], device=x.device)[None]
    else:
        at = (valid.cumsum(-1) - 1).clamp(min=0)
    return at if state is None else at + state.seen[:, None]


def with_earlier(
    k: Tensor, v: Tensor, valid: Tensor | None, state: DecodeState | None
) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """Return keys and values with those of the state before them, and which are valid, None where all are."""
    if state is None:
        return (k, v), valid
    keys, values = state.inner
    for name, old, new in (("keys", keys, k), ("values", values, v)):
        if old.dtype != new.dtype or old.shape[1] != new.shape[1] or old.shape[3] != new.shape[3]:
            raise ShapeMismatch(
                f"the state's {name} are {old.dtype} {list(old.shape)}, and the new ones {new.dtype} "
                f"{list(new.shape)}."
            )
    known = None
    if valid is not None or state.valid is not None:
        parts = (state.valid, keys), (valid, k)
        known = torch.cat([_known(part, keys_) for part, keys_ in parts], 1)
    return (torch.cat([keys, k], 2), torch.cat([values, v], 2)), known


def _known(valid: Tensor | None, keys: Tensor) -> Tensor:
    if valid is not None:
        return valid
    return torch.ones(keys.shape[0], keys.shape[2], dtype=torch.bool, device=keys.device)
