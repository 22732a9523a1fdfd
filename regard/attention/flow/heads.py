"""Flow-Attention: attention whose weights conserve flow, in time linear in the length.

    q, k <- phi(q), phi(k), phi = sigmoid;      <a, b> = sum_d (a_d + eps) (b_d + eps)
    I_i = <q_i, sum_j k_j>                      flow into target i, [L]
    O_j = <k_j, sum_i q_i>                      flow out of source j, [S]
    A_i = <q_i, sum_j k_j / O_j>                what arrives at a target where each source gives 1
    L_j = <k_j, sum_i q_i / I_i>                what leaves a source where each target takes 1
    w_j = S softmax_j(L)                        competition of the sources
    g_i = sigmoid(A_i L / S)                    allocation at the targets
    out_i = g_i / I_i sum_j (q_i . k_j) w_j v_j

Causally every sum runs over the positions up to i, of which there are n_i: k_j / O_j and q_j / I_j are taken
times n_j, A_i and L_i divided by n_i, and w_i = n_i exp(L_i) / sum_{j <= i} exp(L_j), g_i = sigmoid(A_i). As
w_j is fixed when j is written, it decodes from a state of fixed size. The mean of L is L / S and that of A is
S / L, which is what "conserves" means. The weights of a row need not sum to 1.

Source: Wu et al., 2022, arXiv 2202.06258, section 3. Status: agrees with the official code
(thuml/Flowformer), whose folders clamp L differently: `FlowAttention.preset` names them. By default it is
clamped to 10 causally, else not. Padding is our choice: it takes part in no sum and no softmax, and L, S and
n count what is valid.

Operations O(T * D * (C + Dv)) in chunks of C; decoding costs O(D * Dv), whatever the length.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from regard.attention.checks import check_state
from regard.attention.dsf.ltv import LTV
from regard.attention.dsf.registry import system_of
from regard.attention.dsf.rows import flow_attention as system_of_rows
from regard.attention.matrices import dense_mask
from regard.attention.mechanism import Context, Mechanism, State
from regard.engines.flows import CHUNK, causal_flows
from regard.engines.fresh import fresh
from regard.engines.rows import expand_heads
from regard.engines.scan import scan
from regard.errors import RegardError, ShapeMismatch

AUTO, CAUSAL_CLAMP = "auto", 10.0
NEVER = -1e30
NUMBERS = {"cpu": 2**17, "cuda": 2**26}


class FlowAttentionHeads(Mechanism):
    """Flow-Attention; the module of `FlowAttention`."""

    carries_state = True
    honours = frozenset({"softcap"})
    exempt: ClassVar = {
        "offset": "the flow out of a source counts the queries before it, so the last alone do not do",
        "absorb": "a cache of keys and values does not hold the queries that its state is made from",
    }

    def __init__(
        self, clamp: float | str | None = AUTO, kernel: str = "sigmoid", eps: float = 1e-6,
        competition: bool = True, allocation: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.clamp, self.kernel, self.eps = clamp, kernel, eps
        self.competition, self.allocation = competition, allocation

    def context(self, q: Tensor, k: Tensor, ctx: Context | None) -> Context:
        ctx = super().context(q, k, ctx)
        if ctx.causal and (ctx.offset or q.shape[2] != k.shape[2]):
            raise ShapeMismatch(
                f"causal flow attention needs every query from the first on, and was given {q.shape[2]} for "
                f"{k.shape[2]} keys; use `step` for positions that come after others."
            )
        return ctx

    def matrix(self, q: Tensor, k: Tensor, ctx: Context | None = None) -> Tensor:
        ctx = self.context(q, k, ctx)
        features, keys = self._pair(q, k, ctx)
        if ctx.causal:
            write, read = self._causal_naive(features, keys, ctx.valid_keys)
        else:
            incoming, outgoing = self._flow(features, keys.sum(2)), self._flow(keys, features.sum(2))
            arriving = self._flow(features, (keys / outgoing[..., None]).sum(2))
            leaving = self._flow(keys, (features / incoming[..., None]).sum(2))
            write, read = self._compete(features, keys, incoming, arriving, leaving, ctx)
        weights = read[..., :, None] * (features @ keys.transpose(-1, -2)) * write[..., None, :]
        mask = dense_mask(ctx, q.device)
        return weights if mask is None else weights * _visible(mask)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context | None = None) -> Tensor:
        ctx = self.context(q, k, ctx)
        if ctx.causal:
            return self._stepped(q, k, v, None, ctx)[0]
        return self._full(q, k, v, ctx)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, ctx: Context | None = None
    ) -> tuple[Tensor, State]:
        ctx = self.context(q, k, ctx)
        if state is not None:
            batch, heads, _, width = q.shape
            shapes = [(batch,), (batch, heads, 4, width), (batch, heads), (batch, heads, width, v.shape[3])]
            check_state(state, shapes, torch.float64 if q.dtype == torch.float64 else torch.float32)
        return self._stepped(q, k, v, state, ctx)

    def absorb(self, k: Tensor, v: Tensor, heads: int, ctx: Context | None = None) -> State:
        raise RegardError(
            "flow attention cannot take over a cache of keys and values, for its state is made from the "
            "earlier queries too; start with an empty cache."
        )

    def system(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the features, competition w and read-out g / I of causal positions, by definition."""
        ctx = self.context(q, k, ctx)
        features, keys = self._pair(q, k, ctx)
        return features, keys, *self._causal_naive(features, keys, ctx.valid_keys)

    def _pair(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        keys = expand_heads(self._features(k, ctx.valid_keys), q.shape[1])
        return self._features(q, ctx.valid_queries), keys

    def _features(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """phi(x), zero at padding, float64 where x is and float32 otherwise."""
        x = x if x.dtype == torch.float64 else x.float()
        x = x.sigmoid() if self.kernel == "sigmoid" else x.relu() + 1e-6
        return x if valid is None else x * valid[:, None, :, None]

    def _full(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        """Outputs where all see all."""
        features, keys = self._pair(q, k, ctx)
        incoming, outgoing = self._product(features, keys.sum(2)), self._product(keys, features.sum(2))
        arriving = self._product(features, _mixed(1 / outgoing, keys))
        leaving = self._product(keys, _mixed(1 / incoming, features))
        write, read = self._compete(features, keys, incoming, arriving, leaving, ctx)
        state = keys.transpose(-1, -2) @ (expand_heads(v, q.shape[1]) * write[..., None])
        return ((features @ state) * read[..., None]).to(v.dtype)

    def _stepped(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, ctx: Context
    ) -> tuple[Tensor, State]:
        """Outputs of causal positions and the state after them, in pieces that a cache holds."""
        each = NUMBERS.get(q.device.type, NUMBERS["cuda"]) // max(1, q[:, :, :1].numel())
        each = max(CHUNK, each // CHUNK * CHUNK)
        parts = [x.split(each, 2) for x in (q, k, v)]
        valid = ctx.valid_keys
        known = [None] * len(parts[0]) if valid is None else valid.split(each, 1)
        kept = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *(state or ())))
        whole = None if kept else fresh((*q.shape[:3], v.shape[3]), v.dtype, q.device)
        outs, start = [], 0
        for q_, k_, v_, valid_ in zip(*parts, known, strict=True):
            out, read, state = self._piece(q_, k_, v_, state, valid_)
            if whole is None:
                outs.append((out * read).to(v.dtype))
            else:
                part = whole[:, :, start : start + q_.shape[2]]
                torch.mul(out, read, out=part) if out.dtype == v.dtype else part.copy_(out * read)
            start += q_.shape[2]
        assert state is not None
        return torch.cat(outs, 2) if whole is None else whole, state

    def _piece(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, valid: Tensor | None
    ) -> tuple[Tensor, Tensor, State]:
        """What is read of some positions [B, H, T, Dv], the share of it that is output, and the state."""
        count, sums, total, memory = (None, None, None, None) if state is None else state
        k, v = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
        q, k = self._features(q, valid), self._features(k, valid)
        n, count = _counted(q, valid, count)
        flows = causal_flows(q, k, n, sums, eps=self.eps)
        write, total = self._causal_write(flows.leaving, n, valid, total)
        read = self._share(flows.arriving) / flows.incoming
        out, memory = scan(q, k, v * write[..., None], state=memory)
        return out, read[..., None], (count, flows.sums, total, memory)

    def _product(self, x: Tensor, total: Tensor) -> Tensor:
        """<x_i, total> of all positions, as one product of matrices."""
        total = total + self.eps
        return _mixed(total, x.transpose(-1, -2)) + self.eps * total.sum(-1, keepdim=True)

    def _flow(self, x: Tensor, total: Tensor) -> Tensor:
        """The same written out, with a total for all positions or one for each."""
        total = total[:, :, None] if total.ndim < x.ndim else total
        return ((x + self.eps) * (total + self.eps)).sum(-1)

    def _compete(
        self, q: Tensor, k: Tensor, incoming: Tensor, arriving: Tensor, leaving: Tensor, ctx: Context
    ) -> tuple[Tensor, Tensor]:
        """Competition w [B, H, S] and read-out g / I [B, H, L], where all see all."""
        leaving = self._clamped(leaving, causal=False)
        targets, sources = _number(q, ctx.valid_queries), _number(k, ctx.valid_keys)
        if ctx.valid_keys is not None:
            leaving = leaving.masked_fill(~ctx.valid_keys[:, None], NEVER)
        write = leaving.softmax(-1) * sources if self.competition else torch.ones_like(leaving)
        return write, self._share(arriving * targets / sources) / incoming

    def _causal_naive(self, q: Tensor, k: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same for causal order, with every sum written out."""
        n = _counted(q, valid, None)[0][:, None]
        incoming, outgoing = self._flow(q, k.cumsum(2)) / n, self._flow(k, q.cumsum(2)) / n
        arriving = self._flow(q, (k / outgoing[..., None]).cumsum(2)) / n
        leaving = self._flow(k, (q / incoming[..., None]).cumsum(2)) / n
        powers = self._clamped(leaving, causal=True).exp()
        powers = powers if valid is None else powers * valid[:, None]
        total = powers.cumsum(2)
        write = n * powers / torch.where(total > 0, total, 1.0)
        write = write if self.competition else torch.ones_like(write)
        return write, self._share(arriving) / (incoming * n)

    def _causal_write(
        self, leaving: Tensor, n: Tensor, valid: Tensor | None, total: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Competition at each position [B, H, T], and the logarithm of the sum of exp(L) up to the last."""
        leaving = self._clamped(leaving, causal=True)
        if valid is not None:
            leaving = leaving.masked_fill(~valid[:, None], NEVER)
        if total is None:
            total = leaving.new_full(leaving.shape[:2], NEVER)
        totals = torch.logaddexp(torch.logcumsumexp(leaving, 2), total[..., None])
        write = n[:, None] * (leaving - totals).exp() if self.competition else torch.ones_like(leaving)
        return write, totals[..., -1] if totals.shape[2] else total

    def _clamped(self, leaving: Tensor, *, causal: bool) -> Tensor:
        clamp = self.clamp
        if isinstance(clamp, str):
            clamp = CAUSAL_CLAMP if causal else None
        return leaving if clamp is None else leaving.clamp(-clamp, clamp)

    def _share(self, arriving: Tensor) -> Tensor:
        return arriving.sigmoid() if self.allocation else torch.ones_like(arriving)


@system_of(FlowAttentionHeads)
def system(mixer: FlowAttentionHeads, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> tuple[LTV, Tensor]:
    """Return causal Flow-Attention as a linear time-varying system, and the values of every query head."""
    features, keys, write, read = mixer.system(q, k, ctx)
    return system_of_rows(features, keys, write, read, v.shape[-1]), expand_heads(v, q.shape[1])


def _visible(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _mixed(share: Tensor, x: Tensor) -> Tensor:
    """sum_j share_j x_j, [B, H, D]."""
    return (share[..., None, :] @ x)[..., 0, :]


def _number(x: Tensor, valid: Tensor | None) -> Tensor | float:
    """How many positions there are, at least 1, [B, 1, 1] where some are padding."""
    if valid is None:
        return max(1, x.shape[2])
    return valid.sum(-1).clamp(min=1).to(x.dtype)[:, None, None]


def _counted(q: Tensor, valid: Tensor | None, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """n, the number of valid positions up to each, at least 1, [B, T], and the number of all, [B]."""
    one = q.new_ones(len(q), q.shape[2]) if valid is None else valid.to(q.dtype)
    before = q.new_zeros(len(q)) if before is None else before
    n = one.cumsum(-1) + before[:, None]
    return n.clamp(min=1), n[:, -1] if n.shape[1] else before
