"""Attention calibration (ACT): take attention from hidden sinks, and hand it to the other tokens of the row.

    a_h[t]  = 1 / n_t sum_{i >= t} A_h[i, t]             n_t: rows that see key t
    S_h     = { t >= 1 : a_h[t] > alpha / N }            N: tokens of the sequence, 5 = alpha
    A'[i,s] = beta A[i, s]                               s in S_h, beta = 0.4
    A'[i,t] = A[i, t] (1 + (1 - beta) sum_s A[i, s] / sum_{u not in S_h} A[i, u])        t not in S_h

Sinks are found anew for every head, sequence and input, over the whole prompt. The first token is none of
them and receives its share; row 0 stays. Padding is not counted. In decoding, where the paper says nothing,
the sinks of the prompt stay, and each new row is calibrated over them; a prompt fed in chunks has the sinks
of all columns seen so far.

Source: Yu et al., 2024, arXiv 2406.15765, sections 3 and 4. Status: agrees with the official code where
position 0 is the first column above its threshold, in a prefill without padding; decoding is our choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.edit.registry import edit
from regard.engines.rows import RowBlock
from regard.errors import RegardError
from regard.runtime.edits import redistribute, targets
from regard.runtime.edits.targets import HeadName
from regard.runtime.protocol import EVERYTHING, Edit, Wanted

if TYPE_CHECKING:
    from regard.runtime.anatomy import Anatomy
    from regard.runtime.call import Call

ALPHA, BETA = 5.0, 0.4
FEWEST = 3


@edit("act")
@dataclass(frozen=True, kw_only=True, eq=False)
class ACT(Edit):
    """Calibrate the attention of chosen heads.

    Attributes:
        heads: `(layer, head)` pairs; default all heads of the main stack but those of the first two layers
            and of the last, as the paper has it. May be given first, without its name.
        alpha: how many times the even share 1 / N a column's mean must exceed to be a sink.
        threshold: a fixed bound in place of alpha / N; the official code has 0.1.
        beta: the part of a sink's attention that it keeps, in [0, 1]; 1 changes nothing.
        min_rows: rows that must see a key for it to be a sink; the paper asks for none, and its last
            columns are means of very few.

    Raises:
        RegardError: on creation, for an alpha, threshold, beta or min_rows out of range, or no heads.
        NoSuchSite: when a session is made, for a head that is not there.

    Example:
        >>> edit = ACT([(5, 3), (6, 0)], beta=0.2)
        >>> edit.alpha
        5.0
    """

    heads: Sequence[HeadName] | None = field(default=None, kw_only=False)
    alpha: float = ALPHA
    threshold: float | None = None
    beta: float = BETA
    min_rows: int = 1

    def __post_init__(self) -> None:
        if self.heads is not None and not list(self.heads):
            raise RegardError("ACT was given no heads; leave heads= out to mean all of the middle layers.")
        if not self.alpha > 0:
            raise RegardError(f"alpha is {self.alpha}; it must be above 0.")
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise RegardError(
                f"threshold is {self.threshold}; it must be from 0 up to, and not including, 1."
            )
        if not 0 <= self.beta <= 1:
            raise RegardError(f"beta is {self.beta}; it must be from 0 to 1.")
        if self.min_rows < 1:
            raise RegardError(f"min_rows is {self.min_rows}; it must be 1 at least.")

    def check(self, anatomy: Anatomy) -> None:
        """Refuse heads that the model does not have, and a model without middle layers."""
        if self.heads is not None:
            targets.check_heads(self.heads, anatomy, "ACT")
            here: dict[str, list[int]] = {}
            for layer, head in self.heads:
                here.setdefault(anatomy.site(layer).alias, []).append(head)
            object.__setattr__(self, "_here", here)
            return
        stack = [site.alias for site in anatomy.sites if site.kind == anatomy.main]
        if not stack[2:-1]:
            raise RegardError(
                f"ACT leaves out the first two layers and the last, and there are {len(stack)}; name heads."
            )
        object.__setattr__(self, "_middle", frozenset(stack[2:-1]))

    def named(self, anatomy: Anatomy) -> list[str]:
        """Return the aliases of the layers whose heads are named."""
        return targets.named_layers((layer for layer, _ in self.heads or ()), anatomy)

    def wants(self, call: Call) -> Wanted | None:
        if call.site.cross:
            return None
        if self.heads is None:
            return EVERYTHING if call.site.alias in self._middle else None  # type: ignore[attr-defined]
        here = self._here.get(call.site.alias)  # type: ignore[attr-defined]
        return Wanted(heads=targets.within(call, here)) if here else None

    def surveys(self, call: Call) -> bool:
        """Steps of one token leave the sinks as they are."""
        return call.query_length > 1 or "sinks" not in call.run.state(self, call.site, call.part)

    def survey(self, block: RowBlock) -> None:
        """Add up what each key receives."""
        call, state = block.call, self._state(block)
        if state.get("forward") != call.run.fed:
            state["before"] = state.get("mass"), state.get("rows")
            state["forward"] = call.run.fed
            state["mass"], state["rows"] = self._begun(block, state.pop("before"))
        state.pop("sinks", None)
        place = slice(call.kv_offset + block.key_start, call.kv_offset + block.key_stop)
        real = 1.0 if block.valid_rows is None else block.valid_rows[:, None, :, None].float()
        received = (self._mine(block, block.weights) * real).sum(2)
        seen = (targets.visible_keys(block).float() * real).sum(2).amax(1)
        state["mass"][..., place] += received
        state["rows"][:, place] += seen

    def weights(self, block: RowBlock) -> Tensor:
        call, state = block.call, self._state(block)
        if "sinks" not in state:
            state["sinks"] = self._sinks(call, state)
        place = slice(call.kv_offset + block.key_start, call.kv_offset + block.key_stop)
        sinks = state["sinks"][..., place]
        missing = block.key_stop - block.key_start - sinks.shape[2]
        sinks = torch.nn.functional.pad(sinks, (0, missing))[:, :, None]
        columns = self._columns(block)
        old = targets.pick(block.weights, columns)
        after_first = (block.query_positions > 0)[:, None]
        return targets.put(block.weights, columns, redistribute(old, sinks, None, 1 - self.beta, after_first))

    def _state(self, block: RowBlock) -> dict[str, Any]:
        return block.run.state(self, block.site, block.call.part)

    def _columns(self, block: RowBlock) -> list[int] | None:
        here = None if self.heads is None else self._here[block.site.alias]  # type: ignore[attr-defined]
        return targets.columns(block, here)

    def _mine(self, block: RowBlock, x: Tensor) -> Tensor:
        return targets.pick(x, self._columns(block))

    def _begun(self, block: RowBlock, before: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
        """Sums of zero for every position so far, and what earlier chunks of the prompt gave."""
        weights, call = self._mine(block, block.weights), block.call
        end = call.kv_offset + call.key_length
        mass = weights.new_zeros(weights.shape[0], weights.shape[1], end)
        rows = weights.new_zeros(weights.shape[0], end)
        if before[0] is not None and before[0].shape[:2] == mass.shape[:2]:
            mass[..., : before[0].shape[2]] += before[0]
            rows[:, : before[1].shape[1]] += before[1]
        return mass, rows

    def _sinks(self, call: Call, state: dict[str, Any]) -> Tensor:
        """Return which keys are sinks of which heads, bool [B, H', P]."""
        mass, rows = state["mass"], state["rows"]
        start = rows.new_zeros(len(rows)) if call.pad_left is None else call.pad_left.to(rows)
        places = torch.arange(rows.shape[1], device=rows.device)
        count = (rows > 0).sum(1, keepdim=True)
        bound = self.alpha / count.clamp_min(1) if self.threshold is None else self.threshold
        mean = mass / rows.clamp_min(1)[:, None]
        able = (rows >= self.min_rows) & (places > start[:, None]) & (count >= FEWEST)
        over = mean > (bound[:, None] if isinstance(bound, Tensor) else bound)
        return over & able[:, None]
