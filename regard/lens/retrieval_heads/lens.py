"""Which heads look at the token that is written next, while it stands in a marked span.

At each step of `generate()`, with A the attention of the last row and w the token that the step chooses:

    j* = argmax_j A_j                      over all keys
    the head copies  where  j* is in the span  and  token_j* = w

    recall      distinct positions of the span copied / positions of the span
    frequency   steps that copied / positions of the span; one position may count again, so it may exceed 1

Only the last row of the prompt and the rows of later steps are opened, so a prompt of any length is read by
the fast attention.

Source: "Retrieval Head Mechanistically Explains Long-Context Factuality" (Wu et al., 2024, arXiv 2404.15574),
equation 1 (`recall`, which counts distinct tokens there) and its official code (`frequency`). Status: agrees
with the official code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.engines.rows import RowBlock
from regard.errors import NothingObserved
from regard.lens.base import Place, SequenceLens, head_table
from regard.lens.matches import tokens_of
from regard.runtime.call import Call
from regard.runtime.head_table import HeadTable
from regard.runtime.protocol import Wanted
from regard.runtime.run import Run
from regard.runtime.tally import Tally

SPAN = "needle"
QUANTITIES = ("recall", "frequency")


@dataclass(frozen=True, kw_only=True, eq=False)
class Copying(SequenceLens):
    """Count what heads copy out of the span `needle` while `generate()` runs.

    The span is given to `watch`: `spans={"needle": bool [B, S]}`, True at the tokens of the answer.

    Attributes:
        stops: tokens after which a sequence has ended, so that nothing counts any more.

    Example:
        >>> with regard.watch(model, Copying(), spans={"needle": span}) as seen:    # doctest: +SKIP
        ...     model.generate(ids, max_new_tokens=10)
        >>> seen[Copying].top("recall", 5)                                          # doctest: +SKIP
    """

    definition = "share of the tokens of a hidden fact that are written while the head looks at them most"
    source = "Wu et al. 2024, arXiv 2404.15574"
    needs = "it takes generate() on token ids, and watch(spans={'needle': ...})"

    stops: Sequence[int] = ()

    def wants(self, call: Call) -> Wanted | None:
        if call.site.cross or SPAN not in call.run.spans or tokens_of(call) is None:
            return None
        return Wanted(rows=(call.query_length - 1, call.query_length))

    def weights(self, block: RowBlock) -> None:
        call = block.call
        row = call.query_length - 1 - block.start
        if not 0 <= row < block.stop - block.start:
            return
        state = self.state(block.run, block.site, call.part)
        state["peak"] = block.weights[:, :, row].argmax(-1) + call.kv_offset + block.key_start
        block.run.state(self).setdefault("states", {})[block.site.alias] = state

    def step(self, run: Run, tokens: Tensor) -> None:
        """Settle what the rows before looked at, now that their token is known."""
        own = run.state(self)
        if not own.get("states"):
            return
        span = _spread(run.spans[SPAN], len(tokens))
        ids = run.token_ids
        assert ids is not None
        ended = own.get("ended", torch.zeros_like(tokens, dtype=torch.bool))
        span = torch.nn.functional.pad(span, (0, ids.shape[1] - span.shape[1])).to(ids.device)
        wanted = span & (ids == tokens[:, None]) & ~ended[:, None]
        place = (span.cumsum(1) - 1).clamp_min(0)
        size = int(span.sum(1).max())
        for state in own["states"].values():
            peak = state.pop("peak", None)
            if peak is not None:
                _count(state, wanted.gather(1, peak), place.gather(1, peak), size)
        stops = torch.tensor(list(self.stops), device=tokens.device, dtype=tokens.dtype)
        own["ended"] = ended | torch.isin(tokens, stops)
        own["size"] = span.sum(1)
        for state in own["states"].values():
            state["size"] = own["size"]

    def fold(self, tally: Tally, place: Place, state: dict[str, Any]) -> None:
        if "copied" not in state:
            return
        size = state["size"].cpu().double()[:, None].clamp_min(1)
        tally.append(place, "recall", state["copied"].sum(-1).cpu().double() / size)
        tally.append(place, "frequency", state["steps"].cpu().double() / size)

    def each(self) -> dict[str, dict[str, Tensor]]:
        """Return what was found sequence by sequence: quantity -> alias -> float64 [N, H].

        Raises:
            NothingObserved: where nothing was generated.
        """
        tally = self.tally.settled()  # type: ignore[attr-defined]
        found = {name: {a: torch.cat(parts) for a, parts in tally.get(name).items()} for name in QUANTITIES}
        if not found["recall"]:
            raise NothingObserved(f"Copying has seen nothing: {self.needs}.")
        return found

    def result(self) -> HeadTable:
        """Return one row a head: means over all sequences, answered or not.

        Raises:
            NothingObserved: where nothing was generated.
        """
        found = self.each()
        values = {a: {name: found[name][a].mean(0) for name in QUANTITIES} for a in found["recall"]}
        return head_table(HeadTable, self, values)


def _spread(span: Tensor, batch: int) -> Tensor:
    """Repeat a span of each sequence for its beams."""
    return span if len(span) == batch else span.repeat_interleave(batch // len(span), 0)


def _count(state: dict[str, Any], hit: Tensor, place: Tensor, size: int) -> None:
    """Add hits [B, H] at places [B, H] of the span."""
    if "copied" not in state:
        state["copied"] = torch.zeros(*hit.shape, size, dtype=torch.bool, device=hit.device)
        state["steps"] = torch.zeros(hit.shape, dtype=torch.long, device=hit.device)
    state["copied"] |= torch.nn.functional.one_hot(place.clamp_max(size - 1), size).bool() & hit[..., None]
    state["steps"] += hit
