"""Heads put out, or sent to the sink: always, or on the texts on which they idle.

    zero      the head's output is 0
    sink      A'_is = 1 and 0 elsewhere, s the first token
    entropy   one of these for each sequence and head where r < t_1 and c > t_2

    r = mean_i H(A_i) / log(i + 1)          normalised entropy of rows, that of the first row 0
    c = max_j  H(A_:j / sum_i A_ij) / log(N - j)

H in nats, i and j from 0; i + 1 and N - j are how many keys a row and rows a key can see, whatever the
padding. An idle head has low rows, all on one key, and a level column. Thresholds are arguments: none are
published. While a text grows by one token at a time, what was decided of its beginning stands.

Source: "Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs" (Guo
et al., 2024, arXiv 2410.13835), code `LLM/src/entropy.py` and `hook.py`. Status: agrees with the official
code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from regard.engines.rows import RowBlock
from regard.errors import RegardError
from regard.runtime.anatomy import Anatomy
from regard.runtime.call import Call
from regard.runtime.edits import ForceAttention, ScaleHeads, targets
from regard.runtime.protocol import Edit, Wanted

HeadName = targets.HeadName
Mode = Literal["zero", "sink", "entropy"]


def silence(
    heads: Sequence[HeadName], mode: Mode = "zero", *, row_below: float | None = None,
    column_above: float | None = None, then: Literal["zero", "sink"] = "sink",
) -> Edit:  # fmt: skip
    """Return the edit that puts heads out; for `regard.steer`, beside others, around `generate()` too.

    Args:
        heads: `(layer, head)` pairs, such as `ContrastTable.dormant` gives.
        mode: `zero`; `sink`, all attention on the first token; or `entropy`, `then` where a head idles.
        row_below, column_above: thresholds of `entropy`, each between 0 and 1.
        then: what `entropy` does.

    Raises:
        RegardError: for another mode, no head, or thresholds that are missing or not wanted.

    Example:
        >>> with regard.steer(model, silence([(16, 3)], "sink")):    # doctest: +SKIP
        ...     model.generate(**inputs)
    """
    thresholds = row_below, column_above
    if mode == "entropy":
        if None in thresholds:
            raise RegardError("mode is 'entropy'; give row_below and column_above, each between 0 and 1.")
        return EntropyGate(heads, row_below=row_below, column_above=column_above, then=then)  # type: ignore[arg-type]
    if thresholds != (None, None):
        raise RegardError(f"row_below and column_above are of mode 'entropy', and mode is {mode!r}.")
    if mode not in ("zero", "sink"):
        raise RegardError(f"mode is {mode!r}; it must be zero, sink or entropy.")
    if not list(heads):
        raise RegardError("silence needs at least one (layer, head).")
    return ScaleHeads(heads=heads) if mode == "zero" else ForceAttention(heads, to="first")


@dataclass(frozen=True, kw_only=True, eq=False)
class EntropyGate(Edit):
    """Put heads out on the sequences on which they idle.

    Attributes:
        heads: `(layer, head)` pairs.
        row_below: a head idles where the mean normalised entropy of its rows is below this,
        column_above: and the largest of its columns above this.
        then: `sink`, all attention on the first token, or `zero`, none anywhere.

    Raises:
        RegardError: for no head, thresholds out of range, or another `then`.
        NoSuchSite: when a session is made, for a layer or head that is not there.
    """

    heads: Sequence[HeadName] = field(kw_only=False)
    row_below: float
    column_above: float
    then: Literal["zero", "sink"] = "sink"

    def __post_init__(self) -> None:
        if not list(self.heads):
            raise RegardError("EntropyGate needs at least one (layer, head).")
        if (
            not 0 <= self.row_below <= 1
            or not 0 <= self.column_above <= 1
            or self.then not in ("zero", "sink")
        ):
            raise RegardError(
                f"row_below is {self.row_below}, column_above {self.column_above}, then {self.then!r}; the "
                "thresholds lie between 0 and 1, and then is zero or sink."
            )

    def check(self, anatomy: Anatomy) -> None:
        """Refuse heads that the model does not have."""
        targets.check_heads(self.heads, anatomy, "EntropyGate")

    def named(self, anatomy: Anatomy) -> list[str]:
        """Return the aliases of the layers whose heads are meant."""
        return targets.named_layers((layer for layer, _ in self.heads), anatomy)

    def wants(self, call: Call) -> Wanted | None:
        heads = targets.heads_here(call, self.heads)
        return Wanted(heads=heads) if heads else None

    def survey(self, block: RowBlock) -> None:
        call, state = block.call, block.run.state(self, block.site, block.call.part)
        if "idle" in state and call.query_length == 1:
            return
        where = targets.columns(block, targets.heads_here(call, self.heads))
        _add(state, block, targets.pick(block.weights, where))
        if block.stop == call.query_length:
            rows, columns = _entropies(state)
            state["idle"] = (rows < self.row_below) & (columns > self.column_above)
            for name in SUMS:
                del state[name]

    def weights(self, block: RowBlock) -> Tensor:
        where = targets.columns(block, targets.heads_here(block.call, self.heads))
        old = targets.pick(block.weights, where)
        idle = block.run.state(self, block.site, block.call.part)["idle"][:, :, None, None]
        new = torch.zeros_like(old)
        if self.then == "sink":
            first = (block.key_positions == 0)[:, None, None, :] & targets.visible_keys(block)
            new = torch.where(first.any(-1, keepdim=True), first.to(old.dtype), old)
        return targets.put(block.weights, where, torch.where(idle, new, old))


SUMS = ("row_sum", "row_count", "column", "column_log", "seen")


def _add(state: dict[str, Any], block: RowBlock, weights: Tensor) -> None:
    """Add a block of weights [B, h, R, K] to the sums that entropies are made of."""
    call = block.call
    visible = targets.visible_keys(block).any(1)
    valid = torch.ones_like(visible[..., 0]) if block.valid_rows is None else block.valid_rows
    count = visible.sum(-1)
    if block.start == 0:
        shape = (*weights.shape[:2], call.key_length)
        state["row_sum"], state["row_count"] = weights.new_zeros(shape[:2]), weights.new_zeros(shape[0], 1)
        state["column"], state["column_log"] = weights.new_zeros(shape), weights.new_zeros(shape)
        state["seen"] = weights.new_zeros(shape[0], 1, shape[2])
    total = weights.sum(-1, keepdim=True)
    shares = torch.where(total > 0, weights / total.clamp_min(1e-30), 0.0)
    scale = torch.where(count > 1, count.clamp_min(2).log().reciprocal(), 0.0) * valid
    state["row_sum"] += (torch.special.entr(shares).sum(-1) * scale[:, None]).sum(-1)
    state["row_count"] += valid.sum(-1, keepdim=True)
    keys = slice(block.key_start, block.key_stop)
    kept = weights * valid[:, None, :, None]
    state["column"][..., keys] += kept.sum(2)
    state["column_log"][..., keys] += torch.special.entr(kept).sum(2)
    state["seen"][..., keys] += (visible & valid[..., None]).sum(1, keepdim=True)


def _entropies(state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the mean entropy of rows and the largest of columns, normalised, each [B, h]."""
    total = state["column"]
    sum_of = total.clamp_min(1e-30)
    entropy = torch.where(total > 0, state["column_log"] / sum_of + sum_of.log(), 0.0)
    scale = torch.where(state["seen"] > 1, state["seen"].clamp_min(2).log().reciprocal(), 0.0)
    return state["row_sum"] / state["row_count"].clamp_min(1), (entropy * scale).amax(-1)
