"""`lightnet_attention`: LightNet's mixing of positions as a function of q, k and v."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from regard.attention.lightnet.additive import NOTHING, Piece, State, absorb, doubled, empty, piece_of, run
from regard.errors import RegardError, ShapeMismatch

METHODS = ("chunk", "safe", "recurrent", "naive")
Method = Literal["chunk", "safe", "recurrent", "naive"]


def lightnet_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    valid: Tensor | None = None,
    starts: Tensor | None = None,
    state: State | None = None,
    scale: float = 1.0,
    angles: tuple[Tensor, Tensor] | None = None,
    method: Method = "chunk",
) -> tuple[Tensor, State]:
    """Return scale * sum_s (q_t . softmax_s(k)) v_s, and the state after the last key.

    The softmax is over the keys up to t, or over all, one for each channel. q is taken as it is: LightNet's
    layer has SiLU before it.

    Args:
        q: [B, H, T, D].
        k: logits [B, Hkv, S, D], with H a multiple of Hkv, and S = T where causal; -inf writes nothing.
        v: [B, Hkv, S, Dv].
        causal: whether a row sees no key after it.
        valid: bool [B, S], False at padding, which writes nothing. A row that sees no key is 0.
        starts: bool [B, S], True where a packed sequence begins; rows see their own sequence alone.
        state: what this returned for the positions before, where causal: S [B, Hkv, D, Dv], of 2 D rows with
            angles, and z [B, Hkv, D], both float32, or float64 where q is.
        angles: cosines and sines [1|B, Hkv, S, D] from `MDLRPE`, by which q and the softmax of k are doubled
            to [x cos, x sin], so that channel c counts cos(theta_c (t - s)).
        method: `chunk`, without decays where that is safe; `safe`, with decays everywhere; `recurrent` and
            `naive`, the recurrence and the sum as they are written, for comparison.

    Returns:
        out [B, H, T, Dv] in the dtype of q, and (S, z).

    Raises:
        ShapeMismatch: where shapes or the state's dtypes do not fit.
        RegardError: for a state without causal order, an unknown method, or NaN or infinity.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 9, 4).unbind()
        >>> whole, _ = lightnet_attention(q, k, v, causal=True)
        >>> first, state = lightnet_attention(q[:, :, :5], k[:, :, :5], v[:, :, :5], causal=True)
        >>> rest, _ = lightnet_attention(q[:, :, 5:], k[:, :, 5:], v[:, :, 5:], causal=True, state=state)
        >>> torch.allclose(torch.cat([first, rest], 2), whole, atol=1e-5)
        True
    """
    _check(q, k, v, causal, valid, starts, state, angles, method)
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    if starts is not None:
        return _packed(q, k, v, causal, valid, starts, state, scale, angles, method)
    piece = piece_of(q, k, v, valid, angles)
    before = empty(q, k, v, angles is not None) if state is None else state
    if not causal:
        last = absorb(piece, before)
        queries = q.to(kind).unflatten(1, (k.shape[1], -1))
        out = (doubled(queries, angles, 1) @ last[0][:, :, None]).flatten(1, 2)
    elif q.shape[2] == 0:
        out, last = q.new_zeros(*q.shape[:3], v.shape[3], dtype=kind), before
    elif method == "recurrent":
        out, last = _recurrent(piece, before)
    elif method == "naive":
        out, last = _naive(piece, before), absorb(piece, before)
    else:
        out, last = run(piece, before, factorise=method == "chunk")
    return (out if scale == 1 else out * scale).to(q.dtype), last


def _recurrent(piece: Piece, state: State) -> tuple[Tensor, State]:
    """The recurrence as it is written, position by position."""
    outs = []
    q = doubled(piece.q.unflatten(1, (piece.k.shape[1], -1)), piece.angles, 1)
    for t, one in enumerate(piece.split(1)):
        state = absorb(one, state)
        outs.append(q[:, :, :, t, None] @ state[0][:, :, None])
    return torch.cat(outs, 3).flatten(1, 2), state


def _naive(piece: Piece, state: State) -> Tensor:
    """The sum as it is written, a row at a time: O(T^2 D)."""
    S, z = state
    outs = []
    q = doubled(piece.q.unflatten(1, (piece.k.shape[1], -1)), piece.angles, 1)
    for t in range(piece.length):
        logits = torch.cat([z[:, :, None], piece.k[:, :, : t + 1]], 2)
        there = logits > NOTHING / 2
        weights = torch.where(there, logits.softmax(2), 0.0)
        part = None if piece.angles is None else tuple(x[:, :, : t + 1] for x in piece.angles)
        keys = doubled(weights[:, :, 1:], part)  # type: ignore[arg-type]
        old = weights[:, :, 0] if part is None else torch.cat([weights[:, :, 0]] * 2, -1)
        memory = keys.transpose(2, 3) @ piece.v[:, :, : t + 1] + old[..., None] * S
        outs.append(q[:, :, :, t, None] @ memory[:, :, None])
    return torch.cat(outs, 3).flatten(1, 2)


def _packed(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, valid: Tensor | None, starts: Tensor,
    state: State | None, scale: float, angles: tuple[Tensor, Tensor] | None, method: Method,
) -> tuple[Tensor, State]:  # fmt: skip
    """Lay packed sequences beside each other, padded, and put the outputs back in place."""
    batch, length = starts.shape
    begins = starts.clone()
    begins[:, :1] = True
    first = begins.flatten().nonzero()[:, 0]
    sizes = torch.diff(first, append=first.new_tensor([batch * length]))
    places = pad_sequence([torch.arange(a, a + n) for a, n in zip(first, sizes, strict=True)], True, 0)
    places = places.to(q.device)
    there = torch.arange(places.shape[1], device=q.device) < sizes[:, None]

    def laid(x: Tensor) -> Tensor:
        return x.expand(batch, *x.shape[1:]).transpose(1, 2).flatten(0, 1)[places].transpose(1, 2)

    rows = torch.div(first, length, rounding_mode="floor")
    queries, keys, values = laid(q), laid(k), laid(v)
    given = empty(queries, keys, values, angles is not None)
    if state is not None:
        goes_on = (first % length == 0) & ~starts[:, 0][rows]
        given = tuple(torch.where(goes_on.view(-1, *[1] * (x.ndim - 1)), x[rows], e)
                      for x, e in zip(state, given, strict=True))  # type: ignore[assignment]  # fmt: skip
    seen = there if valid is None else there & valid.flatten()[places]
    out, last = lightnet_attention(
        queries, keys, values, causal=causal, valid=seen, state=given if causal else None,
        scale=scale, angles=None if angles is None else (laid(angles[0]), laid(angles[1])), method=method,
    )  # fmt: skip
    whole = out.transpose(1, 2)[there].unflatten(0, (batch, length)).transpose(1, 2)
    ends = torch.diff(rows, append=rows.new_tensor([batch])) > 0
    return whole, (last[0][ends], last[1][ends])


def _check(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, valid: Tensor | None, starts: Tensor | None,
    state: State | None, angles: tuple[Tensor, Tensor] | None, method: str,
) -> None:  # fmt: skip
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or not x.is_floating_point():
            raise ShapeMismatch(f"{name} must be floating-point [batch, heads, time, dim], and is {_of(x)}.")
    if method not in METHODS:
        raise RegardError(f"method is {method!r}; it must be one of {', '.join(METHODS)}.")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ShapeMismatch(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} must agree in batch, q and k in "
            "width, and k and v in heads and time."
        )
    if q.shape[1] % max(1, k.shape[1]):
        raise ShapeMismatch(f"q has {q.shape[1]} heads, which is no multiple of the {k.shape[1]} of k.")
    if (causal or starts is not None or angles is not None) and q.shape[2] != k.shape[2]:
        raise ShapeMismatch(
            f"q has {q.shape[2]} positions and k {k.shape[2]}; with causal order, starts or angles they must "
            "be as many."
        )
    for name, flags in (("valid", valid), ("starts", starts)):
        if flags is not None and (flags.shape != (k.shape[0], k.shape[2]) or flags.dtype != torch.bool):
            raise ShapeMismatch(f"{name} must be bool {[k.shape[0], k.shape[2]]}, and is {_of(flags)}.")
    if angles is not None:
        for name, x in zip(("cosines", "sines"), angles, strict=True):
            if x.shape[1:] != k.shape[1:] or x.shape[0] not in (1, k.shape[0]):
                raise ShapeMismatch(f"the {name} must be [1|B, Hkv, T, D] as k {list(k.shape)}, and are "
                                    f"{_of(x)}.")  # fmt: skip
    if state is not None:
        _check_state(state, causal, q, k, v, angles is not None)
    for name, x in (("q", q), ("k", k), ("v", v)):
        low, high = x.detach().aminmax() if x.numel() else (x.new_zeros(()), x.new_zeros(()))
        if not bool(high.isfinite()) or (name != "k" and not bool(low.isfinite())):
            raise RegardError(f"{name} holds NaN or infinity{'; -inf is allowed' if name == 'k' else ''}.")


def _check_state(state: State, causal: bool, q: Tensor, k: Tensor, v: Tensor, angles: bool) -> None:
    if not causal:
        raise RegardError(
            "a state was given without causal order; it is of the positions before, so causal=True."
        )
    wanted = empty(q, k, v, angles)
    if not isinstance(state, tuple) or len(state) != 2 or not all(isinstance(x, Tensor) for x in state):
        raise ShapeMismatch("the state must be the pair (S, z) that lightnet_attention returned.")
    for name, given, like in zip(("S", "z"), state, wanted, strict=True):
        if given.shape != like.shape or given.dtype != like.dtype:
            raise ShapeMismatch(f"{name} of the state must be {_of(like)}, and is {_of(given)}.")


def _of(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
