"""How much attention a span receives: from chosen rows, and key by key beside all other keys.

    mass   = mean over rows of sum_{k in span} A_ik         rows that see a key of the span
    even   = mean over the same rows of #{span keys seen} / #{keys seen}    what even attention gives

    alpha_k = sum_i A_ik / #{rows i able to see k}          for one sequence
    on, off = mean of alpha over the span's keys, and over the others
    spread  = variance of alpha over the others             each a mean over sequences

Spans are named in `spans=` of `watch` or `steer`, such as `answer`, or the masked tokens of a text. A sink
logit's share is not counted. The second three are the parts of the attention diagnostics of Zhuang et al.,
2025, arXiv 2502.07490, section 5. Status: partly our choice (per head; the paper says not over what it
averages).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.engines.rows import RowBlock
from regard.engines.stats import span_mass
from regard.lens.base import Place, RowMeans, SequenceLens, head_table
from regard.lens.columns import add_columns, note_columns
from regard.lens.visible import kept_rows, visible_part
from regard.runtime.call import Call
from regard.runtime.head_table import HeadTable
from regard.runtime.spans import span_at, span_of_keys
from regard.runtime.tally import Tally

SOURCE = "Zhuang et al. 2025, arXiv 2502.07490"


class _Part(NamedTuple):
    mass: Tensor
    even: Tensor
    rows: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class SpanMass(RowMeans):
    """Measure the share of their attention that rows give to a span; one row a head: `mass`, `even`.

    Attributes:
        span: name of the span of keys.
        rows: name of a span whose rows count; default all that see a key of `span`.
    """

    columns = ("mass", "even")
    definition = "mean over rows of the attention on the span; even: what even attention would give"
    source = SOURCE
    needs = "no row that sees a key of the span was opened"

    span: str
    rows: str | None = None

    def measure(self, block: RowBlock) -> _Part:
        call, batch = block.call, block.weights.shape[0]
        span = span_of_keys(block, self.span)
        seen = visible_part(call, block.start, block.stop, block.key_start, block.key_stop)
        if seen is None:
            seen = torch.ones_like(span[:1, None]).expand(1, block.stop - block.start, -1)
        hit = (seen & span[:, None]).sum(-1)
        keep = hit > 0
        real = kept_rows(block)
        keep = keep if real is None else keep & real
        if self.rows is not None:
            first = call.q_offset + block.start
            rows = span_at(block.run, self.rows, first, first + block.stop - block.start, batch)
            keep = keep & rows.to(keep.device)
        even = hit / seen.sum(-1).clamp_min(1)
        return _Part(span_mass(block.weights, span), even.expand(batch, -1), keep.expand(batch, -1))

    def total(self, call: Call, parts: list[_Part]) -> tuple[Tensor, Tensor]:
        keep = torch.cat([part.rows for part in parts], -1)
        mass = torch.cat([part.mass for part in parts], -1)
        even = torch.cat([part.even for part in parts], -1)
        given = (mass * keep[:, None]).sum((0, 2))
        alike = (even * keep).sum().expand_as(given)
        return torch.stack([given, alike]), keep.sum().expand(2, 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class SpanFocus(SequenceLens):
    """Measure what the keys of a span receive, and the others; one row a head: `on`, `off`, `spread`.

    Attributes:
        span: name of the span of keys.
    """

    definition = "mean attention received by a key of the span, by another; variance over the others"
    source = SOURCE
    needs = "no attention was opened"

    span: str

    def weights(self, block: RowBlock) -> None:
        note_columns(self.state(block.run, block.site, block.call.part), block, None)

    def end_call(self, call: Call) -> None:
        state = self.state(call.run, call.site, call.part)
        add_columns(state, call)
        if "rows" in state:
            stop = call.kv_offset + call.key_length
            span = span_at(call.run, self.span, 0, stop, len(state["rows"]))
            state["span"] = span.to(state["rows"].device)

    def fold(self, tally: Tally, place: Place, state: dict[str, Any]) -> None:
        if "mass" not in state:
            return
        span, length = state["span"].cpu(), state["span"].shape[1]
        rows = state["rows"][:, :length].cpu().double()
        alpha = state["mass"][..., :length].cpu().double() / rows.clamp_min(1)[:, None]
        for name, keys in (("on", span), ("off", ~span)):
            _tally(tally, place, name, alpha, keys & (rows > 0))

    def result(self) -> HeadTable:
        """Return one row a head.

        Raises:
            NothingObserved: where no attention was opened.
        """
        tally = self.tally.settled()  # type: ignore[attr-defined]
        names = ("on", "off", "spread")
        found = {name: tally.get(name) for name in names}
        values = {alias: {name: found[name][alias] for name in names} for alias in tally.aliases}
        return head_table(HeadTable, self, values)


def _tally(tally: Tally, place: Place, name: str, alpha: Tensor, keys: Tensor) -> None:
    """Add the mean of alpha [B, H, K] over some keys, bool [B, K]; and its variance, of the others."""
    count = keys.sum(1)
    some = count > 0
    weight = keys[some, None] / count[some, None, None]
    mean = (alpha[some] * weight).sum(-1)
    tally.mean(place, name, mean.sum(0), float(some.sum()))
    if name == "off":
        spread = ((alpha[some] - mean[..., None]).square() * weight).sum(-1)
        tally.mean(place, "spread", spread.sum(0), float(some.sum()))
