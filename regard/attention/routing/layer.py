"""Routing attention with its projections: a layer from x to x.

    q, v = W_q x, W_v x                  all heads
    k = q of the cluster heads where queries are keys, W_k x of the others
    out = W_o [cluster heads, local heads]

Positions turn the local heads alone: what a token is, and not where it stands, says which cluster it is in.

Source: Roy et al., 2020, arXiv 2003.05997, section 4. Status: partly our choice: the official code has
learned relative positions, by rank in a cluster; here cluster heads have none.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from regard.attention.checks import check_padding
from regard.attention.decoding import positions_of
from regard.attention.mechanism import Context, State
from regard.attention.positions import Rotary
from regard.attention.routing.heads import RoutingHeads
from regard.attention.routing.options import SELECTIONS, check_choice, check_count
from regard.attention.routing.spec import BalancedRouting, Routing
from regard.errors import RegardError, ShapeMismatch, UnsupportedModel

CACHED = 5


class RoutingAttention(nn.Module):
    """Cluster heads and local heads, with projections.

    Args:
        dim: width of x.
        heads: number of heads.
        local_heads: how many of them, the last, are local; default half.
        clusters, cluster_size, window, nearest, norm, scale, decay, start, commitment: as in `Routing`.
        causal: whether a position sees no later one.
        selection: "causal", where order must hold, or "topw", as published and with other sequences; default
            "causal" where `causal`.
        share_qk: whether the queries of the cluster heads are their keys; default where `causal`.
        mask_self: whether a token sees itself in a cluster head only where it sees nothing else; default
            where `share_qk`, for the own score is then the highest there can be.
        damping: as in `BalancedRouting`.
        head_dim: width of a head; default dim / heads.
        positions: of the local heads, "rotary", a `Rotary`, or None.
        device, dtype: of the parameters.

    Raises:
        RegardError: where an argument will not do.

    Example:
        >>> layer = RoutingAttention(32, 4, clusters=4, cluster_size=8, window=8).eval()
        >>> x = torch.randn(2, 30, 32)
        >>> first, state = layer.step(x[:, :20])
        >>> rest, state = layer.step(x[:, 20:], state)
        >>> torch.allclose(torch.cat([first, rest], 1), layer(x), atol=1e-5)
        True
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        local_heads: int | None = None,
        clusters: int = 16,
        cluster_size: int = 64,
        window: int = 256,
        causal: bool = True,
        selection: str | None = None,
        share_qk: bool | None = None,
        mask_self: bool | None = None,
        nearest: int = 2,
        norm: str = "layernorm",
        scale: float | None = None,
        damping: float = 0.01,
        decay: float = 0.999,
        start: str = "noise",
        commitment: float = 1e-4,
        head_dim: int | None = None,
        positions: str | Rotary | None = "rotary",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(dim, heads, head_dim, positions)
        self.dim, self.heads, self.causal = dim, heads, causal
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.share_qk = causal if share_qk is None else share_qk
        self.positions = Rotary() if positions == "rotary" else positions
        selection = selection or ("causal" if causal else "topw")
        check_choice("selection", selection, SELECTIONS)
        if selection == "causal" and not causal:
            raise RegardError("selection is 'causal', by which nothing later is seen, and causal is False.")
        options: dict[str, Any] = {
            "heads": heads, "width": self.head_dim, "local_heads": local_heads, "clusters": clusters,
            "cluster_size": cluster_size, "window": window, "norm": norm, "scale": scale,
            "mask_self": self.share_qk if mask_self is None else mask_self, "decay": decay, "start": start,
            "commitment": commitment,
        }  # fmt: skip
        spec = Routing(nearest=nearest, **options) if selection == "causal" else None
        self.mechanism: RoutingHeads = (spec or BalancedRouting(damping=damping, **options)).build()
        made: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        width = heads * self.head_dim
        own = (heads - self.mechanism.routed if self.share_qk else heads) * self.head_dim
        self.queries, self.values = nn.Linear(dim, width, **made), nn.Linear(dim, width, **made)
        self.keys = nn.Linear(dim, own, **made) if own else None
        self.output = nn.Linear(width, dim, **made)
        self.to(device=device, dtype=dtype)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, memory: Tensor | None = None) -> Tensor:
        """Return the outputs [B, T, dim]; rows of padding are arbitrary.

        Args:
            x: [B, T, dim].
            mask: bool, False at padding: [B, T], or [B, S] of the memory.
            memory: [B, S, dim], whose keys and values are read in place of those of x, in any order; for
                layers without order, local heads and shared queries.

        Raises:
            ShapeMismatch: where they do not fit.
            RegardError: where the layer takes no memory.
        """
        self._check_input(x, mask, memory)
        at, of = positions_of(x, mask if memory is None else None), x if memory is None else memory
        q = self._queries(x, at)
        k, v = self._keys(of, at, q), self._split(self.values(of))
        return self._closed(self.mechanism(q, k, v, Context.of(q, k, causal=self.causal, valid=mask)))

    def step(self, x: Tensor, state: State | None = None, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """Return the outputs of new positions [B, T, dim], and the state after them.

        The state, batch first: how many tokens were read, int64 [B]; keys and values [B, H, S, D]; which are
        no padding, bool [B, S]; the clusters of the keys of cluster heads, int64 [B, heads, S, m].

        Raises:
            UnsupportedModel: for the selection "topw", whose clusters are of whole sequences.
            ShapeMismatch: where the state does not fit.
        """
        if not self.causal or (self.mechanism.balanced and self.mechanism.routed):
            raise UnsupportedModel(
                "clusters of whole sequences (selection='topw') cannot decode step by step; call the layer "
                "on the whole, or give selection='causal'."
            )
        self._check_input(x, mask, None)
        self._check_state(state, x)
        seen = torch.zeros(len(x), dtype=torch.int64, device=x.device) if state is None else state[0]
        at = positions_of(x, mask) + seen[:, None]
        q = self._queries(x, at)
        k, v = self._keys(x, at, q), self._split(self.values(x))
        known = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        kept: dict[str, Any] = {}
        if state is not None:
            k, v = torch.cat([state[1], k], 2), torch.cat([state[2], v], 2)
            seen, known = seen + known.sum(-1), torch.cat([state[3], known], 1)
            kept["clusters"] = state[4]
        else:
            seen = known.sum(-1)
        ctx = replace(Context.of(q, k, valid=None if bool(known.all()) else known), kept=kept)
        out = self._closed(self.mechanism(q, k, v, ctx))
        none = torch.zeros(len(x), 0, k.shape[2], 1, dtype=torch.int64, device=x.device)
        return out, (seen, k, v, known, kept.get("clusters", none))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}, causal={self.causal}, share_qk={self.share_qk}"

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _turned(self, x: Tensor, at: Tensor, first: int) -> Tensor:
        """Heads [B, H, T, D], the local ones, from `first`, with their positions."""
        if self.positions is None or first == x.shape[1]:
            return x
        assert isinstance(self.positions, Rotary)
        return torch.cat([x[:, :first], self.positions(x[:, first:], at)], 1)

    def _queries(self, x: Tensor, at: Tensor) -> Tensor:
        return self._turned(self._split(self.queries(x)), at, self.mechanism.routed)

    def _keys(self, x: Tensor, at: Tensor, q: Tensor) -> Tensor:
        """Keys of x; those of the cluster heads are their queries q, where these are shared."""
        routed = self.mechanism.routed
        parts = [] if self.keys is None else [self._split(self.keys(x))]
        parts = [q[:, :routed], *parts] if self.share_qk else parts
        return self._turned(torch.cat(parts, 1), at, routed)

    def _closed(self, out: Tensor) -> Tensor:
        mixed: Tensor = self.output(out.transpose(1, 2).flatten(2))
        return mixed

    def _check_input(self, x: Tensor, mask: Tensor | None, memory: Tensor | None) -> None:
        for name, given in (("x", x), ("memory", memory)):
            if given is not None and (given.ndim != 3 or given.shape[-1] != self.dim):
                raise ShapeMismatch(f"{name} must be [batch, time, {self.dim}], and is {list(given.shape)}.")
        of = x if memory is None else memory
        check_padding("mask", mask, (of.shape[0], of.shape[1]))
        if memory is None:
            return
        if len(memory) != len(x):
            raise ShapeMismatch(f"memory is of {len(memory)} sequences, and x of {len(x)}.")
        if self.causal or self.share_qk or self.mechanism.routed < self.heads:
            raise RegardError(
                "only a layer with causal=False, share_qk=False and local_heads=0 can read a memory: in "
                "another sequence nothing is earlier, the same or near."
            )

    def _check_state(self, state: State | None, x: Tensor) -> None:
        if state is None:
            return
        fits = len(state) == CACHED and all(len(part) == len(x) for part in state)
        if not fits or state[1].shape[1] != self.heads or state[1].shape[3] != self.head_dim:
            told = ", ".join(str(list(part.shape)) for part in state)
            raise ShapeMismatch(
                f"the state has tensors {told}; it must be what step() returned for {len(x)} sequences, "
                f"{self.heads} heads and width {self.head_dim}."
            )


def _check(dim: Any, heads: Any, head_dim: Any, positions: Any) -> None:
    check_count("dim", dim, 1)
    check_count("heads", heads, 1)
    if head_dim is not None:
        check_count("head_dim", head_dim, 1)
    elif dim % heads:
        raise RegardError(f"dim is {dim}, which {heads} heads do not divide; give head_dim.")
    if not isinstance(positions, Rotary) and positions not in (None, "rotary"):
        raise RegardError(f"positions is {positions!r}; it must be 'rotary', a Rotary or None.")
