"""Lightning Attention: causal linear attention with a fixed exponential decay a head.

    o_i = scale * sum_{j <= i} exp(-s (i - j)) (q_i . k_j) v_j      q, k [T, D], v [T, Dv]; s >= 0, one a head
    S_i = exp(-s) S_{i-1} + k_i v_i^T,   o_i = scale * q_i S_i      the state, [D, Dv]

No softmax, no denominator, and no 1 / sqrt(D) unless `scale` says so. A padded position writes nothing and
ages nothing. Outputs are not normalised and grow where s is near 0; a norm after them is part of the layer.

Sources: Qin et al., 2024, arXiv 2405.17381, section 3, and arXiv 2401.04658. Status: agrees with the official
code. Operations O(T * (C + D) * Dv) a head, memory O(T * (C + D)) or, in tiles, O(C * D); decoding O(D * Dv)
a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, overload

import torch
from torch import Tensor

from regard.attention.lightning.packed import as_packed, as_padded, starts_of
from regard.attention.lightning.rates import given_rates
from regard.attention.lightning.tiles import by_tiles, full_precision
from regard.engines.rows import expand_heads
from regard.engines.scan import scan
from regard.errors import RegardError, ShapeMismatch

METHODS = ("auto", "chunk", "tiles", "recurrent", "naive")
Rates = Tensor | Sequence[float] | None
CHUNK, LONGEST_CHUNK = 64, 4096
FORGET = -800.0  # exp of it is 0 in float64


@overload
def lightning_attention(
    q: Tensor, k: Tensor, v: Tensor, rates: Rates = None, *, chunk_size: int = ..., scale: float = ...,
    initial_state: Tensor | None = ..., return_state: Literal[False] = ..., mask: Tensor | None = ...,
    cu_seqlens: Tensor | Sequence[int] | None = ..., method: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def lightning_attention(
    q: Tensor, k: Tensor, v: Tensor, rates: Rates = None, *, chunk_size: int = ..., scale: float = ...,
    initial_state: Tensor | None = ..., return_state: Literal[True], mask: Tensor | None = ...,
    cu_seqlens: Tensor | Sequence[int] | None = ..., method: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Rates = None,
    *,
    chunk_size: int = CHUNK,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    method: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Return causal linear attention with a decay of each head, and, where asked for, the last state.

    Args:
        q: [B, H, T, D]; D may be odd, T may be 0.
        k: [B, Hkv, T, D]; H is a multiple of Hkv, and consecutive query heads share a key head.
        v: [B, Hkv, T, Dv].
        rates: s, one for each query head, as from `decay_rates`; None for no decay.
        chunk_size: positions in a chunk or tile, from 1; near D is fastest.
        scale: factor on q k^T.
        initial_state: [B, H, D, Dv], or with `cu_seqlens` [N, H, D, Dv]; float64 where q is and float32
            otherwise. None for zero.
        return_state: whether to return the state after the last position too.
        mask: bool [B, T], False at padding, wherever it stands.
        cu_seqlens: [N + 1], where N sequences packed into a batch of one begin, and the length at the end.
        method: `chunk`, many chunks at once by the shared engine, or by tiles where their size is no power
            of two; `tiles`, one tile after another, with gradients written by hand; `recurrent`, position by
            position; `naive`, the T x T matrix; `auto` for `naive` where one chunk holds all, else `chunk`.

    Returns:
        out [B, H, T, Dv] in the dtype of v; with `return_state` also the state, [B, H, D, Dv], or of every
        packed sequence, [N, H, D, Dv].

    Raises:
        ShapeMismatch: where the tensors do not fit together.
        RegardError: for a negative rate, a chunk below 1, an unknown method, or numbers that are not finite.

    Example:
        >>> q = k = v = torch.ones(1, 1, 3, 1)
        >>> out, state = lightning_attention(q, k, v, [0.0], return_state=True)
        >>> out.flatten().tolist(), state.item()
        ([1.0, 2.0, 3.0], 3.0)
        >>> half = torch.tensor([2.0]).log()
        >>> lightning_attention(q, k, v, half).flatten().tolist()
        [1.0, 1.5, 1.75]
    """
    if method not in METHODS:
        raise RegardError(f"method is {method!r}; it must be one of {', '.join(METHODS)}.")
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1:
        raise RegardError(f"chunk_size is {chunk_size!r}; it must be a number of positions, from 1.")
    _check_inputs(q, k, v)
    _check_mask(mask, q, cu_seqlens)
    call = Call(q, k, v, given_rates(rates, q.shape[1], q.device), float(scale), initial_state, mask)
    if cu_seqlens is None:
        out, state = call.checked().run(method, chunk_size)
        return (out, state) if return_state else out
    bounds = starts_of(cu_seqlens, q)
    if initial_state is None and not return_state:
        return replace(call, bounds=bounds).run(method, chunk_size)[0]
    padded, valid = as_padded((q, k, v), bounds)
    out, state = (
        replace(call, q=padded[0], k=padded[1], v=padded[2], valid=valid).checked().run(method, chunk_size)
    )
    out = as_packed(out, bounds)
    return (out, state) if return_state else out


@dataclass(frozen=True, eq=False)
class Call:
    """One call with checked inputs: what `lightning_attention` takes, rates float64 [H].

    Attributes:
        valid: bool [B, T], False at padding, or None.
        bounds: of packed sequences, int64 [N + 1], or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rates: Tensor
    scale: float
    state: Tensor | None
    valid: Tensor | None
    bounds: Tensor | None = None

    @property
    def kind(self) -> torch.dtype:
        """What sums are kept in."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    def checked(self) -> Call:
        """Return the same, or refuse a state of another call."""
        if self.state is None:
            return self
        wanted = (*self.q.shape[:2], self.q.shape[3], self.v.shape[3])
        if tuple(self.state.shape) != wanted:
            raise ShapeMismatch(f"the state is {list(self.state.shape)}; it must be {list(wanted)}.")
        if self.state.dtype != self.kind or self.state.device != self.q.device:
            raise ShapeMismatch(
                f"the state is {_name(self.state.dtype)} on {self.state.device}; with q "
                f"{_name(self.q.dtype)} it must be {_name(self.kind)} on {self.q.device}."
            )
        return self

    def run(self, method: str, chunk: int) -> tuple[Tensor, Tensor]:
        """Return out [B, H, T, Dv] in the dtype of v, and the last state."""
        with full_precision(self.q.device):
            out, state = self._summed(method, chunk)
        return out.to(self.v.dtype), state

    def _summed(self, method: str, chunk: int) -> tuple[Tensor, Tensor]:
        length, heads = self.q.shape[2], self.q.shape[1]
        k, v = expand_heads(self.k, heads), expand_heads(self.v, heads)
        state = self.state
        if state is None:
            state = self.q.new_zeros(*self.q.shape[:2], self.q.shape[3], v.shape[3], dtype=self.kind)
        q = self.q if self.scale == 1.0 else self.q * self.scale
        if method == "auto":
            method = "naive" if length <= chunk else "chunk"
        if method == "chunk" and (chunk & (chunk - 1) or chunk > LONGEST_CHUNK):
            method = "tiles"
        if method == "chunk":
            starts = None if self.bounds is None else _at(self.bounds, length)
            return scan(q, k, v, -self.rates, state, valid=self.valid, starts=starts, chunk=chunk)
        if method == "tiles" and self.rates.requires_grad:
            raise RegardError(
                "rates require a gradient, and `tiles` has none for them; learn rates by `chunk`, whose "
                "gradients "
                "are autograd's."
            )
        q, k, v = (x.to(self.kind) for x in (q, k, v))
        if self.valid is not None:
            k = k * self.valid[:, None, :, None]
        decay = self._by_step()
        if method == "tiles":
            return by_tiles(q, k, v, decay, state, chunk)
        return (_naive if method == "naive" else _recurrent)(q, k, v, decay, state)

    def _by_step(self) -> Tensor:
        """The logarithmic decay of every position, float64 [B|1, H, T]; nothing ages at padding."""
        decay = -self.rates[None, :, None].expand(1, -1, self.q.shape[2])
        if self.valid is not None:
            decay = decay * self.valid[:, None, :]
        if self.bounds is not None:
            decay = decay.masked_fill(_at(self.bounds, self.q.shape[2])[:, None], FORGET)
        return decay


def _naive(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    sums = decay.cumsum(-1)[..., None]
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    apart = (sums - sums.mT).masked_fill(~later, -torch.inf)
    out = (q @ k.mT * apart.exp().to(q.dtype)) @ v + sums.exp().to(q.dtype) * (q @ state)
    if q.shape[2] == 0:
        return out, state
    end = sums[:, :, -1:]
    return out, end.exp().to(q.dtype) * state + ((end - sums).exp().to(q.dtype) * k).mT @ v


def _recurrent(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    kept = decay.exp().to(q.dtype)[..., None, None]
    outs = [q[:, :, :0] @ state]
    for i in range(q.shape[2]):
        state = kept[:, :, i] * state + k[:, :, i, :, None] * v[:, :, i, None]
        outs.append(q[:, :, i, None] @ state)
    return torch.cat(outs, 2), state


def _at(bounds: Tensor, length: int) -> Tensor:
    """bool [1, T], True where a packed sequence begins."""
    starts = torch.zeros(1, length + 1, dtype=torch.bool, device=bounds.device)
    starts[0, bounds] = True
    return starts[:, :length]


def _check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point():
            told = f"{_name(x.dtype)} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ShapeMismatch(f"{name} must be floating-point [batch, heads, time, dim], and is {told}.")
    if k.shape[0] != q.shape[0] or k.shape[2:] != q.shape[2:] or v.shape[:3] != k.shape[:3]:
        raise ShapeMismatch(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit: they must agree in "
            f"batch and "
            "time, q and k in dim, and k and v in heads."
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ShapeMismatch(f"q has {q.shape[1]} heads, which is no multiple of the {k.shape[1]} of k and v.")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not bool(torch.isfinite(x.detach().sum(dtype=torch.float64))):
            raise RegardError(f"{name} has numbers that are not finite.")


def _check_mask(mask: Tensor | None, q: Tensor, cu_seqlens: object) -> None:
    if mask is None:
        return
    if cu_seqlens is not None:
        raise RegardError("mask and cu_seqlens were both given; packed sequences have no padding.")
    if mask.ndim > 2:
        raise RegardError(
            f"mask is {list(mask.shape)}; linear attention forms no scores and cannot honour an arbitrary "
            f"mask, only "
            "padding, bool [batch, time]."
        )
    if tuple(mask.shape) != (q.shape[0], q.shape[2]) or mask.dtype != torch.bool:
        raise ShapeMismatch(
            f"mask must be bool [{q.shape[0]}, {q.shape[2]}], False at padding, and is {_name(mask.dtype)} "
            f"{list(mask.shape)}."
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
