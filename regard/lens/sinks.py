"""How strongly heads park their attention on one token, mostly the first.

    alpha_k = 1 / (T - k) * sum_{i >= k} A_ik          k counted from 0
    rate_k  = mean over sequences of 1[alpha_k > eps]

alpha is the mean attention that key k receives from the rows able to see it. It is held against the
threshold for each sequence and head, and only then averaged: averaging alpha first gives other numbers.
"When Attention Sink Emerges in Language Models: An Empirical View" (Gu et al., 2024, arXiv 2410.10781)
takes eps = 0.3 on the first T = 64 tokens; a longer text dilutes alpha. `first` leaves out the key's own
row, whose weight on it is no choice (k = 0), as "Active-Dormant Attention Heads" (Guo et al., 2024,
arXiv 2410.13835) does.
Positions count from the first real token, whatever the padding. A row that cannot see key k, beyond a
sliding window, is not counted; `reach` says how many can. A sink logit's share is not counted.
Status: agrees with the official code.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from regard.engines.rows import RowBlock
from regard.errors import RegardError, UnsupportedModel
from regard.lens.base import Place, SequenceLens, head_table
from regard.lens.columns import add_columns, first_rows, note_columns
from regard.lens.matches import tokens_of
from regard.lens.registry import lens
from regard.lens.sentences import number, where
from regard.runtime.anatomy import anatomy_of
from regard.runtime.call import Call
from regard.runtime.findings import Finding
from regard.runtime.head_table import HeadTable
from regard.runtime.protocol import Wanted
from regard.runtime.table import finite
from regard.runtime.tally import Tally
from regard.runtime.verbs import watch

if TYPE_CHECKING:
    from regard.cli.request import Request, SystemParser

PLACES = 512
MOST = 0.5
STRONG = 0.8


@dataclass(frozen=True, eq=False)
class SinkTable(HeadTable):
    """A head table of sinks.

    Columns: `rate_0.3` and so on, one per eps: the share of sequences in which alpha is above it;
    `alpha`; `first`, the mean attention on the key from other rows than its own; `heaviest`, the
    position that most often receives the most attention in total, `heaviest_alpha`, its alpha, and
    `heaviest_here`, how often it is the position asked about; `reach`, the share of later rows that
    can see the key: 1 without a sliding window.
    """

    def rate(self, eps: float | None = None) -> float:
        """Return the model's sink rate: the mean over the heads of full reach; NaN where there is none.

        Args:
            eps: which threshold; default the first.
        """
        name = f"rate_{self.about['eps'][0] if eps is None else eps:g}"
        kept = self[name][self["reach"] >= 1]
        return float(kept.mean()) if len(kept) else float("nan")

    @property
    def windowed(self) -> list[str]:
        """Aliases of the sites where some rows cannot see the key; `rate` leaves them out."""
        return sorted({s for s, r in zip(self.sites, self["reach"], strict=True) if r < 1})

    @property
    def bos(self) -> float | None:
        """Share of sequences that began with the model's BOS token; None where that is unknown."""
        return self.about["bos"]


@lens("sinks")
@dataclass(frozen=True, kw_only=True, eq=False)
class Sinks(SequenceLens):
    """Measure attention sinks; the result is a `SinkTable`.

    Attributes:
        eps: thresholds, one column each.
        position: the key asked about, counted from the first real token.
        length: only the first so many rows of each sequence count, 64 in the paper; default all. A
            shorter sequence counts with what it has.
        proxy: divide each row of |weights| by its sum first, for attention that is not normalised.
    """

    definition = "share of sequences in which the key's mean attention received is above eps"
    source = "Gu et al. 2024, arXiv 2410.10781"
    needs = "no row within the length was opened"

    eps: Sequence[float] = (0.3,)
    position: int = 0
    length: int | None = None
    proxy: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        eps = (self.eps,) if isinstance(self.eps, float | int) else tuple(self.eps)
        object.__setattr__(self, "eps", eps)
        if not eps or not all(0 <= e <= 1 for e in eps):
            raise RegardError(f"eps is {eps}; it takes at least one threshold between 0 and 1.")
        if self.position < 0 or (self.length is not None and self.length <= self.position):
            raise RegardError(
                f"position is {self.position} and length {self.length}; a position counts from 0 and "
                "must lie within the length."
            )

    def wants(self, call: Call) -> Wanted | None:
        return first_rows(call, self.length)

    def weights(self, block: RowBlock) -> None:
        state = self.state(block.run, block.site, block.call.part)
        note_columns(state, block, self.length, self.proxy)
        call = block.call
        if "own" not in state:
            state["own"] = block.weights.new_zeros(block.weights.shape[:2])
            state["own_rows"] = state["own"].new_zeros(len(state["own"]))
            state["eligible"] = torch.zeros_like(state["own_rows"])
            state["bos"] = _begins(call)
        if not call.site.cross:
            _add_own(state, block, self.position, self.proxy)

    def end_call(self, call: Call) -> None:
        state = self.state(call.run, call.site, call.part)
        add_columns(state, call)
        later = call.query_positions >= (0 if call.site.cross or not call.causal else self.position)
        if self.length is not None:
            later = later & (call.query_positions < self.length)
        later = later if call.valid_queries is None else later & call.valid_queries
        if "eligible" in state:
            state["eligible"] += later.sum(1)

    def fold(self, tally: Tally, place: Place, state: dict[str, Any]) -> None:
        if "mass" not in state:
            return
        mass = state["mass"].to("cpu", torch.float64)
        rows, eligible = state["rows"].cpu().double(), state["eligible"].cpu().double()
        own, own_rows = state["own"].cpu().double(), state["own_rows"].cpu().double()
        pad = state["pad"].cpu()
        at = (pad + self.position).clamp_max(mass.shape[-1] - 1)
        received, seen = _take(mass, at), rows.gather(1, at[:, None])[:, 0]
        there = (seen > 0) & (pad + self.position < mass.shape[-1])
        alpha = received / seen[:, None]
        count = float(there.sum())
        tally.mean(place, "alpha", alpha[there].sum(0), count)
        for eps in self.eps:
            tally.mean(place, f"rate_{eps:g}", (alpha[there] > eps).sum(0), count)
        others = seen - own_rows
        some = there & (others > 0)
        first = (received - own)[some] / others[some, None]
        tally.mean(place, "first", first.sum(0), float(some.sum()))
        tally.mean(place, "reach", seen[there].sum(), eligible[there].sum())
        heaviest = mass.argmax(-1)
        share = _take(mass, heaviest) / rows.gather(1, heaviest)
        places = (heaviest - pad[:, None]).clamp(0, PLACES)
        everything = float(len(mass))
        tally.mean(place, "heaviest_alpha", share.sum(0), everything)
        tally.mean(place, "heaviest_here", (places == self.position).sum(0), everything)
        tally.mean(place, "places", torch.nn.functional.one_hot(places, PLACES + 1).sum(0), everything)
        if not bool(state["bos"].isnan().any()):
            tally.mean(place, "bos", state["bos"].sum(), everything)

    def result(self) -> SinkTable:
        """Return the table.

        Raises:
            NothingObserved: where no attention was opened.
        """
        tally = self.tally.settled()  # type: ignore[attr-defined]
        names = [f"rate_{eps:g}" for eps in self.eps] + ["alpha", "first"]
        found = {name: tally.get(name) for name in names}
        values: dict[str, dict[str, Any]] = {}
        places, reach = tally.get("places"), tally.get("reach")
        for alias, counts in places.items():
            columns = {name: found[name][alias] for name in names}
            columns["heaviest"] = counts.argmax(-1)
            for name in ("heaviest_alpha", "heaviest_here"):
                columns[name] = tally.get(name)[alias]
            columns["reach"] = reach[alias].expand(len(counts))
            values[alias] = columns
        bos = [float(x) for x in tally.get("bos").values()]
        about = {
            "eps": list(self.eps), "position": self.position, "length": self.length,
            "proxy": self.proxy, "bos": bos[0] if bos else None,
            "sequences": int(max((float(c) for c in tally.count("places").values()), default=0)),
        }  # fmt: skip
        return head_table(SinkTable, self, values, about)

    @classmethod
    def findings(cls, result: SinkTable) -> tuple[Finding, ...]:
        """Heads whose mean attention on the first token, from the other rows, is above 0.8."""
        first = result["first"][np.isfinite(result["first"])]
        if not len(first):
            nothing = "No token but the first can see the first, so nothing can be said of a sink."
            return (Finding(nothing, (), "sinks"),)
        heads = where(result, "first", lambda share: share > STRONG)
        said = (
            f"{len(heads)} of {number(len(first), 'head')} put over {STRONG:.0%} of their attention on the "
            f"first token; the mean over all heads is {first.mean():.0%}."
        )
        found = [Finding(said, heads, "sinks")]
        if result.windowed:
            said = (
                f"In {number(len(result.windowed), 'layer')} a sliding window hides the first token from "
                "some rows, which do not count there."
            )
            found.append(Finding(said, (), "sinks"))
        if result.bos is not None:
            said = f"The text {'began' if result.bos else 'did not begin'} with a BOS token."
            found.append(Finding(said, (), "sinks"))
        return tuple(found)


def _take(mass: Tensor, index: Tensor) -> Tensor:
    """Return mass [B, H, P] at index [B] or [B, H], as [B, H]."""
    index = index[:, None].expand(-1, mass.shape[1]) if index.ndim == 1 else index
    return mass.gather(2, index[..., None])[..., 0]


def _add_own(state: dict[str, Any], block: RowBlock, position: int, proxy: bool) -> None:
    """Add the weight of the key's own row on it, where it is in this block."""
    call = block.call
    low, high = call.q_offset + block.start, call.q_offset + block.stop
    if call.pad_left is None and not low <= position < high:
        return
    batch = torch.arange(block.weights.shape[0], device=block.weights.device)
    row = (position - block.query_positions[:, 0]).expand(len(batch))
    key = (position - block.key_positions[:, 0]).expand(len(batch))
    rows, keys = block.weights.shape[2:]
    inside = (row >= 0) & (row < rows) & (key >= 0) & (key < keys)
    row, key = row.clamp(0, rows - 1), key.clamp(0, keys - 1)
    if block.valid_rows is not None:
        inside = inside & block.valid_rows[batch, row]
    own = block.weights[batch, :, row, key]
    if proxy:
        own = own.abs() / (block.weights[batch, :, row].abs().sum(-1) + 1e-8)
    state["own"] += own * inside[:, None]
    state["own_rows"] += inside


def _begins(call: Call) -> Tensor:
    """Return which sequences begin with the model's BOS token, float [B]; NaN where that is unknown."""
    ids = tokens_of(call)
    bos = getattr(getattr(call.site.module, "config", None), "bos_token_id", None)
    device = call.q.device
    if ids is None or not isinstance(bos, int):
        return torch.full((call.q.shape[0],), float("nan"), device=device)
    pad = torch.zeros(len(ids), dtype=torch.long) if call.pad_left is None else call.pad_left.long()
    return (ids.gather(1, pad.to(ids.device)[:, None])[:, 0] == bos).float().to(device)


def command(parser: SystemParser) -> None:
    """Print how many heads park their attention on the first token: on a text cut into pieces, and on two
    controls of the same size, random tokens and one token repeated.
    """
    parser.takes("model", "text", "seed")
    parser.add_argument(
        "--eps", type=float, nargs="+", default=[0.3], metavar="E",
        help="thresholds for a head's mean attention on the first token (default: 0.3)",
    )  # fmt: skip
    parser.add_argument("--length", type=int, default=64, help="tokens in a piece (default: 64)")
    parser.add_argument(
        "--bos", action=argparse.BooleanOptionalAction,
        help="begin every piece with the BOS token, or with none (default: as the tokenizer does)",
    )  # fmt: skip
    parser.set_defaults(run=_answer)


def _answer(request: Request) -> dict[str, Any]:
    eps, length = sorted(set(request.options.eps)), request.options.length
    if length < 2:
        raise RegardError(f"--length is {length}; a piece takes at least 2 tokens.")
    Sinks(eps=eps, length=length)
    request.check_length(length)
    bos = _bos(request.tokenizer, request.options.bos)
    text, left = _pieces(request, length - len(bos))
    if not any(getattr(site.module, "is_causal", True) for site in anatomy_of(request.model).sites):
        raise UnsupportedModel(
            f"{request.source.name} reads both ways, and a sink is a matter of causal models."
        )
    some = torch.randint(0, request.vocabulary, text.shape, generator=request.generator)
    inputs = {"the text": text, "random tokens": some, "one token repeated": some[:, :1].expand_as(some)}
    tables = {}
    for name, ids in inputs.items():
        begun = torch.tensor(bos, dtype=torch.long).expand(len(ids), -1)
        with watch(request.model, Sinks(eps=eps, length=length)) as seen:
            request.read(torch.cat([begun, ids], 1), f"Reading {name}")
        tables[name] = seen[Sinks]
    _print_rates(request, tables, eps, "with" if bos else "without")
    _print_heads(request, tables["the text"], eps[0])
    return {
        "model": request.source.name, "text": request.text.origin, "pieces": len(text), "length": length,
        "tokens_left_over": left, "bos": bool(bos), "seed": request.options.seed, "eps": eps,
        "rates": {name: {f"{e:g}": finite(t.rate(e)) for e in eps} for name, t in tables.items()},
        "windowed": tables["the text"].windowed,
        "heads": {name: [{k: finite(v) for k, v in row.items()} for row in t.table.rows()]
                  for name, t in tables.items()},
    }  # fmt: skip


def _bos(tokenizer: Any, asked: bool | None) -> list[int]:
    """Return the tokens in front of every piece: the BOS token, or none."""
    token = tokenizer.bos_token_id
    if asked and token is None:
        raise RegardError("--bos: this model's tokenizer has no BOS token.")
    own = token is not None and tokenizer("a")["input_ids"][:1] == [token]
    return [token] if (own if asked is None else asked) else []


def _pieces(request: Request, length: int) -> tuple[Tensor, int]:
    """Return the text's tokens as [N, length], and how many are left over."""
    words, origin = request.text
    found = request.tokenizer(words, add_special_tokens=False, return_tensors="pt", verbose=False)
    ids = found["input_ids"][0]
    count = len(ids) // length
    if not count:
        raise RegardError(
            f"The text ({origin}) has {len(ids)} tokens, and a piece takes {length}; give a longer one, or a "
            "smaller --length."
        )
    return ids[: count * length].view(count, length).long(), len(ids) - count * length


def _print_rates(request: Request, tables: dict[str, SinkTable], eps: list[float], begun: str) -> None:
    table, options = tables["the text"], request.options
    count = table.about["sequences"]
    pieces = f"{count} piece{'s' * (count != 1)} of {options.length} tokens"
    request.say(f"{request.source.name}, {len(table.sites)} heads")
    request.say(f"{request.text.origin}: {pieces}, {begun} BOS")
    request.say()
    request.say("Share of heads whose mean attention on the first token is above eps, over all pieces:")
    request.say(f"  {'eps':18}" + "".join(f"{e:>9g}" for e in eps))
    for name, found in tables.items():
        control = "" if name == "the text" else "   (control)"
        rates = ["-" if (rate := found.rate(e)) != rate else f"{rate:.1%}" for e in eps]
        request.say(f"  {name:18}" + "".join(f"{rate:>9}" for rate in rates) + control)
    if table.windowed:
        request.say(
            f"Not counted, for a window hides the first token from some rows: {', '.join(table.windowed)}."
        )


def _print_heads(request: Request, table: SinkTable, eps: float) -> None:
    """Print, layer by layer, the heads that are above a threshold in most pieces."""
    above: dict[str, list[int]] = {site: [] for site in table.sites}
    for (site, head), rate in zip(table.names, table[f"rate_{eps:g}"], strict=True):
        if rate > MOST:
            above[site].append(head)
    count = sum(map(len, above.values()))
    request.say()
    request.say(f"{count} of {len(table.sites)} heads are above {eps:g} in most pieces of the text:")
    for site, heads in above.items():
        if heads:
            request.say(f"  {site:10} {' '.join(map(str, heads))}")
