"""Texts as pieces of so many tokens, and the sink of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard.engines.rows import RowBlock
from regard.errors import RegardError, ShapeMismatch
from regard.lens.base import Place, SequenceLens
from regard.lens.columns import add_columns, aligned, note_columns
from regard.runtime.call import Call
from regard.runtime.protocol import Lens
from regard.runtime.tally import Tally
from regard.runtime.verbs import watch

SHORTEST, LENGTH, ROWS = 2, 64, 8
NAMES = ("first", "bos", "argmax")
Sink = Literal["first", "bos", "argmax"] | int
Texts = Sequence[str] | Sequence[Tensor]
Tick = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class Pieces:
    """Pieces of texts of one domain.

    Attributes:
        ids: int64 [T] each.
        sinks: the position of each one's sink.
    """

    ids: tuple[Tensor, ...]
    sinks: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def halves(self) -> tuple[Pieces, Pieces]:
        """Return every other piece, and the rest."""
        return tuple(Pieces(self.ids[i::2], self.sinks[i::2]) for i in (0, 1))  # type: ignore[return-value]

    def batches(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (sink, ids [B, T]), pieces of one length and sink together, at most 8 at a time."""
        alike: dict[tuple[int, int], list[Tensor]] = {}
        for ids, sink in zip(self.ids, self.sinks, strict=True):
            alike.setdefault((sink, len(ids)), []).append(ids)
        for (sink, _), rows in alike.items():
            for begin in range(0, len(rows), ROWS):
                yield sink, torch.stack(rows[begin : begin + ROWS])


def cut(texts: Texts, tokenizer: Any, length: int | None = LENGTH, most: int | None = None) -> list[Tensor]:
    """Return texts as pieces of tokens, each int64 [T], beginning as the tokenizer begins a text.

    Args:
        texts: strings, or token ids int64 [T], which are taken as they are.
        tokenizer: of the model; may be None where all texts are token ids.
        length: tokens in a piece; the end of a text that does not fill one is left out, but a text shorter
            than that is one piece. None for texts whole.
        most: at most so many pieces.

    Raises:
        RegardError: where there is no text, or one has fewer than 2 tokens.
        ShapeMismatch: for token ids of another shape.
    """
    if isinstance(texts, str) or not list(texts):
        raise RegardError("texts takes a list of one or more texts.")
    if length is not None and length < SHORTEST:
        raise RegardError(f"length is {length}; a piece takes at least {SHORTEST} tokens.")
    found: list[Tensor] = []
    for number, text in enumerate(texts):
        parts = [_ids(text, number)] if not isinstance(text, str) else _cut(text, tokenizer, length)
        if len(parts[0]) < SHORTEST:
            raise RegardError(
                f"text {number} has {len(parts[0])} tokens, and a sink takes at least {SHORTEST}."
            )
        found += parts
    return found[:most]


def _ids(text: Any, number: int) -> Tensor:
    if not isinstance(text, Tensor) or text.ndim != 1 or text.is_floating_point():
        shape = tuple(text.shape) if isinstance(text, Tensor) else type(text).__name__
        raise ShapeMismatch(f"text {number} is {shape}; give a string, or token ids int64 [T].")
    return text.long().cpu()


def _cut(text: str, tokenizer: Any, length: int | None) -> list[Tensor]:
    if tokenizer is None:
        raise RegardError("texts are strings, and there is no tokenizer; give token ids, or a tokenizer.")
    whole, plain = (
        torch.tensor(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]).long()
        for special in (True, False)
    )
    front = whole[: (len(whole) - len(plain)) if len(whole) > len(plain) and _ends(whole, plain) else 0]
    size = max(1, len(plain) if length is None else length - len(front))
    parts = [plain[at : at + size] for at in range(0, max(1, len(plain)), size)]
    kept = [part for part in parts if len(part) == size] or parts[:1]
    return [torch.cat([front, part]) for part in kept]


def _ends(whole: Tensor, plain: Tensor) -> bool:
    return bool(torch.equal(whole[len(whole) - len(plain) :], plain))


def find_sinks(model: nn.Module, pieces: Sequence[Tensor], sink: Sink, tick: Tick) -> Pieces:
    """Return pieces with the position of each one's sink.

    Args:
        sink: `first`; `bos`, the first BOS token of the model's config; `argmax`, the key that receives the
            most attention in total, all heads of all layers together; or a position.

    Raises:
        RegardError: for another word, a position beyond the shortest piece, or a piece without BOS.
    """
    if sink == "first":
        places = [0] * len(pieces)
    elif sink == "bos":
        places = [_bos_place(model, ids, number) for number, ids in enumerate(pieces)]
    elif sink == "argmax":
        places = [_heaviest(model, ids, tick) for ids in pieces]
    elif isinstance(sink, int) and not isinstance(sink, bool):
        shortest = min(len(ids) for ids in pieces)
        if not 0 <= sink < shortest - 1:
            raise RegardError(
                f"sink is {sink}; the shortest text has {shortest} tokens, and a sink needs a later one, so "
                f"it lies from 0 to {shortest - 2}."
            )
        places = [sink] * len(pieces)
    else:
        raise RegardError(f"sink is {sink!r}; it must be one of {', '.join(NAMES)}, or a position.")
    return Pieces(tuple(pieces), tuple(places))


def _bos_place(model: nn.Module, ids: Tensor, number: int) -> int:
    config = getattr(model, "config", None)
    bos = getattr(config, "bos_token_id", None)
    if not isinstance(bos, int):
        raise RegardError("sink is 'bos', and the model's config names no BOS token; give sink='first'.")
    found = (ids == bos).nonzero()
    if not len(found):
        raise RegardError(f"sink is 'bos', and piece {number} has no BOS token; give sink='first'.")
    return int(found[0, 0])


def _heaviest(model: nn.Module, ids: Tensor, tick: Tick) -> int:
    with watched(model, Received()) as seen:
        forward(model, ids[None], tick)
    received = [x for rows in seen[Received].values() for x in rows]
    return int(torch.stack(received).sum(0)[:-1].argmax())


@contextmanager
def watched(model: nn.Module, *lenses: Lens) -> Iterator[Any]:
    with torch.no_grad(), watch(model, *lenses) as seen:
        yield seen


def forward(model: nn.Module, ids: Tensor, tick: Tick) -> Tensor:
    """Return the logits of token ids [B, T], from one forward without a cache."""
    device = next(model.parameters()).device
    out = model(input_ids=ids.to(device), use_cache=False).logits
    tick(len(ids))
    return out


@dataclass(frozen=True, kw_only=True, eq=False)
class Received(SequenceLens):
    """What each key receives in total over the rows, all heads together."""

    def weights(self, block: RowBlock) -> None:
        note_columns(self.state(block.run, block.site, block.call.part), block, None)

    def end_call(self, call: Call) -> None:
        add_columns(self.state(call.run, call.site, call.part), call)

    def fold(self, tally: Tally, place: Place, state: dict[str, Any]) -> None:
        if "mass" in state:
            mass = aligned(state["mass"].cpu(), state["pad"].cpu()).sum(1)
            for row in mass:
                tally.append(place, "received", row)

    def result(self) -> dict[str, list[Tensor]]:
        return self.tally.get("received")


def over(pieces: Iterable[Pieces], times: int = 1) -> int:
    """Return how many sequences are read, for a bar."""
    return times * sum(len(some) for some in pieces)
