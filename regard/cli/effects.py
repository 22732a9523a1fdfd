"""What a change does beside each lens' numbers: attention by span, head outputs, next tokens, text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from regard.cli.parts import FIRST, REST, SINKS, Places
from regard.edit.act.calibration import ALPHA, FEWEST
from regard.engines.rows import RowBlock
from regard.runtime.call import Call
from regard.runtime.head_table import HeadTable
from regard.runtime.protocol import Lens
from regard.runtime.table import Table

EFFECTS = "effects"
ROWS, TOP, MOVED = 256, 5, 3
Floats = npt.NDArray[np.float64]


@dataclass
class Flow:
    """What one side's heads attend to and give.

    Attributes:
        received: alias -> attention that each key receives from all rows, [H, T].
        outputs: alias -> head outputs of the last rows, before the output projection, [H, R, Dv].
        causal: whether a key is seen only by its own row and later ones.
    """

    received: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    causal: bool = True


class Flows(Lens):
    """Keep the `Flow` of one sequence that is read in one forward."""

    def __init__(self) -> None:
        super().__init__(name=EFFECTS)
        object.__setattr__(self, "flow", Flow())

    def fresh(self) -> Lens:
        return Flows()

    def weights(self, block: RowBlock) -> None:
        call, kept = block.call, self.result().received
        if call.site.kind != call.main:
            return
        if call.site.alias not in kept:
            self.result().causal = call.causal
            kept[call.site.alias] = torch.zeros(call.heads, call.key_length, dtype=torch.float64)
        place = slice(block.key_start, block.key_stop)
        heads = slice(None) if block.heads is None else block.heads.cpu()
        kept[call.site.alias][heads, place] += block.column_sum[0].double().cpu()

    def head_outputs(self, call: Call) -> None:
        if call.site.kind == call.main and call.head_outputs is not None:
            self.result().outputs[call.site.alias] = call.head_outputs[0, :, -ROWS:].float().cpu().clone()

    def result(self) -> Flow:
        return self.flow  # type: ignore[attr-defined]


@dataclass
class Effects:
    """What changed, beyond each lens' numbers.

    Attributes:
        spans: one row a span: tokens, and the share of all attention that goes there, before and after;
            the mean over heads and rows. None where no weights were seen.
        heads: per head `output moved`, |after - before| over |before| of its output, and the change of the
            share of its attention that goes to each span.
        next_tokens: the likeliest tokens after the text and their probabilities, and `divergence` (KL of
            after from before, in nats) there; None where no tokens are predicted.
        turns: the positions where the distributions differ most.
        generated: what each side goes on with; None where not asked for.
        shared: how many generated tokens are the same from the first on.
    """

    spans: Table | None
    heads: HeadTable | None
    next_tokens: Table | None = None
    divergence: float | None = None
    turns: Table | None = None
    generated: tuple[str, str] | None = None
    shared: int = 0

    @property
    def moved(self) -> list[tuple[tuple[str, int], float]]:
        """Heads whose output moved at all, the most first, and by how much."""
        if self.heads is None:
            return []
        sizes = self.heads["output moved"]
        order = np.argsort(-np.nan_to_num(sizes), kind="stable")
        return [(self.heads.names[i], float(sizes[i])) for i in order if sizes[i] > 0]


def flows_changed(before: Flow, after: Flow, places: Places) -> tuple[Table | None, HeadTable | None]:
    """Return attention by span, and the changes of every head.

    A hidden sink is a key after the first that a head gives over 5 / T of its attention before the change
    (as in ACT: the mean over the rows that see it); they stand beside the spans, and may be of one.
    """
    spans: dict[str, Any] = {}
    shares: dict[str, dict[str, tuple[Floats, Floats]]] = {}
    for alias, first in before.received.items():
        second = after.received.get(alias)
        if second is not None and second.shape == first.shape:
            spans = spans or _spans(first.shape[1], places)
            marked = {**spans, SINKS: _sinks(first.numpy(), before.causal)}
            shares[alias] = {
                name: (_share(first.numpy(), where), _share(second.numpy(), where))
                for name, where in marked.items()
            }
    columns: dict[str, dict[str, Any]] = {}
    for alias, old in before.outputs.items():
        new = after.outputs.get(alias)
        if new is not None and new.shape == old.shape:
            moved = (new - old).flatten(1).norm(dim=1) / old.flatten(1).norm(dim=1)
            columns[alias] = {"output moved": moved.double().numpy()}
    for alias, found in shares.items():
        columns.setdefault(alias, {}).update({f"to {n}: change": b - a for n, (a, b) in found.items()})
    words = "|after - before| / |before| of a head's output; the change of its attention to each span"
    about = {"lens": "what changed", "definition": words}
    heads = HeadTable.from_columns(columns, about=about) if columns else None
    return _by_span(shares, spans), heads


def _spans(length: int, places: Places) -> dict[str, npt.NDArray[np.bool_]]:
    """The spans, with the first token before them and what is of none after them."""
    first = np.arange(length) == 0
    if not places:
        return {FIRST: first}
    rest = ~(np.any(list(places.values()), 0) | first)
    return {FIRST: first, **places, **({REST: rest} if rest.any() else {})}


def _sinks(received: Floats, causal: bool) -> npt.NDArray[np.bool_]:
    """Which keys are hidden sinks of which heads, [H, T]."""
    length = received.shape[1]
    seen_by = np.arange(length, 0, -1) if causal else np.full(length, length)
    sinks: npt.NDArray[np.bool_] = received / seen_by > ALPHA / length
    sinks[:, 0] = False
    return sinks & (length >= FEWEST)


def _share(received: Floats, where: npt.NDArray[np.bool_]) -> Floats:
    return (received * where).sum(1) / received.shape[1]


def _by_span(
    shares: Mapping[str, Mapping[str, tuple[Floats, Floats]]], spans: Mapping[str, npt.NDArray[np.bool_]]
) -> Table | None:
    if not shares:
        return None
    rows: dict[str, list[Any]] = {"span": [*spans, SINKS], "tokens": [int(w.sum()) for w in spans.values()]}
    rows["tokens"].append(None)
    for side, name in enumerate(("before", "after")):
        rows[name] = [
            float(np.concatenate([found[span][side] for found in shares.values()]).mean())
            for span in rows["span"]
        ]
    rows["change"] = [b - a for a, b in zip(rows["before"], rows["after"], strict=True)]
    return Table(rows)


def next_tokens(before: Tensor, after: Tensor, tokenizer: Any) -> tuple[Table, float]:
    """Return the likeliest tokens of both sides after the text, and the KL divergence there, in nats.

    Args:
        before, after: log-probabilities [K, V]; the last row is that of the end of the text.
    """
    first, second = before[-1], after[-1]
    ids = list(dict.fromkeys([*first.topk(TOP).indices.tolist(), *second.topk(TOP).indices.tolist()]))
    table = Table(
        {
            "next token": [_word(tokenizer, i) for i in ids],
            "before": first[ids].exp().tolist(),
            "after": second[ids].exp().tolist(),
        }
    )
    return table, float(_divergence(first, second))


def turns(before: Tensor, after: Tensor, ids: Tensor, tokenizer: Any) -> Table | None:
    """Return the positions where the distributions differ most, and the likeliest token of each side."""
    found = _divergence(before, after)
    most = [i for i in found.argsort(descending=True)[:MOVED].tolist() if found[i] > 0]
    if not most:
        return None
    start = ids.shape[1] - len(before)
    told = [ids[0, max(0, start + i - 3) : start + i + 1].tolist() for i in most]
    return Table(
        {
            "position": [start + i for i in most],
            "after the words": [tokenizer.decode(words) for words in told],
            "KL": [float(found[i]) for i in most],
            "before": [_word(tokenizer, int(before[i].argmax())) for i in most],
            "after": [_word(tokenizer, int(after[i].argmax())) for i in most],
        }
    )


def _divergence(before: Tensor, after: Tensor) -> Tensor:
    return (before.exp() * (before - after)).sum(-1).clamp_min(0)


def _word(tokenizer: Any, token: int) -> str:
    return repr(str(tokenizer.decode([token])))[1:-1]


def generate(model: Any, ids: Tensor, count: int) -> list[int]:
    """Return `count` tokens that a model goes on with, the likeliest each time, or fewer where it ends."""
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
            pad_token_id=int(ids[0, -1]),
        )  # fmt: skip
    return [int(token) for token in out[0, ids.shape[1] :]]
