"""Heads that are sinks on one domain of text and work on another: active and dormant.

    contrast_h = first_h(A) - first_h(B)         first: mean attention on the sink, without its own row

Positive: dormant on A, at work on B. Each domain is also read as two halves, every other piece and the
rest; `stability` is the rank correlation of the contrasts between these, and `noise` the difference between
the halves of one domain, which is what chance gives on half as many texts.

Source: "Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs" (Guo et
al., 2024, arXiv 2410.13835), which finds head 25 of layer 16 of Llama-2-7B dormant on Wikipedia and active on
GitHub. Status: partly our choice (the halves).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from regard.errors import NothingObserved, RegardError
from regard.lens.extremes.measure import check_fits, make, merged
from regard.lens.extremes.pieces import LENGTH, Pieces, Sink, Texts, Tick, cut, find_sinks
from regard.runtime.anatomy import anatomy_of, require_attention, root_of
from regard.runtime.head_table import Head, HeadTable
from regard.runtime.progress import bar

STRONG = 0.3


@dataclass(frozen=True, eq=False)
class ContrastTable(HeadTable):
    """A head table of two domains.

    Columns: `contrast`, `a` minus `b`; `a` and `b`, the mean attention on the sink in each domain, its own
    row apart; where both have two pieces or more, `contrast_1` and `contrast_2`, the contrast on either half
    of the pieces, and `noise_a` and `noise_b`, the difference between the halves of one domain.
    """

    @property
    def stability(self) -> float:
        """Rank correlation between the contrasts of the two halves; NaN where a domain has one piece."""
        if "contrast_1" not in self.columns:
            return float("nan")
        try:
            return self.rank_correlation(self, "contrast_1", other_column="contrast_2")
        except NothingObserved:
            return float("nan")

    def ranked(self) -> list[tuple[str, int, float]]:
        """Return `(alias, head, contrast)`, the largest size of contrast first."""
        rows = self.top("contrast", len(self))
        return sorted(rows, key=lambda row: -abs(row[2]))

    def dormant(self, domain: str, least: float = STRONG) -> list[Head]:
        """Return the heads that are dormant on one domain alone, the largest contrast first.

        Args:
            domain: `a` or `b`.
            least: smallest contrast.

        Raises:
            RegardError: for another domain.
        """
        if domain not in ("a", "b"):
            raise RegardError(f"domain is {domain!r}; it must be 'a' or 'b'.")
        sign = 1 if domain == "a" else -1
        return [(site, head) for site, head, value in self.ranked() if sign * value > least]


def compare_sinks(
    model: nn.Module,
    tokenizer: Any,
    texts_a: Texts,
    texts_b: Texts,
    *,
    sink: Sink = "first",
    length: int | None = LENGTH,
    most: int | None = None,
    progress: bool = True,
) -> ContrastTable:
    """Compare the sinks of every head between two domains of text.

    Args:
        model, tokenizer: as for `measure_sinks`.
        texts_a, texts_b: strings, or token ids int64 [T].
        sink: as for `measure_sinks`.
        length: tokens in a piece; a longer piece dilutes attention, so both domains take the same. None for
            texts whole.
        most: at most so many pieces of each domain.
        progress: whether a bar is shown, where stderr is a terminal.

    Raises:
        RegardError: for texts of fewer than 2 tokens, or a sink outside them.
        UnsupportedModel: where no attention of the model can be reached.

    Example:
        >>> table = compare_sinks(model, tokenizer, prose, code)   # doctest: +SKIP
        >>> table.ranked()[:2], table.dormant("b")                 # doctest: +SKIP
    """
    model = root_of(model)
    require_attention(anatomy_of(model))
    found = [cut(texts, tokenizer, length, most) for texts in (texts_a, texts_b)]
    count = sum(map(len, found))
    for pieces in found:
        check_fits(model, pieces)
    with bar("Comparing", count * (1 + (sink == "argmax")), progress) as tick:
        a, b = (find_sinks(model, pieces, sink, tick) for pieces in found)
        return contrast(model, a, b, tick)


def contrast(model: nn.Module, a: Pieces, b: Pieces, tick: Tick) -> ContrastTable:
    """Return the contrast of pieces whose sinks are known."""
    parts = {"a": _halved(model, a, tick), "b": _halved(model, b, tick)}
    whole = {domain: found[0] for domain, found in parts.items()}
    columns: dict[str, Any] = {
        "contrast": whole["a"]["first"] - whole["b"]["first"],
        "a": whole["a"]["first"],
        "b": whole["b"]["first"],
    }
    if all(len(found) == 3 for found in parts.values()):
        columns |= _by_halves(parts)
    table = whole["a"]
    about = {
        "main": table.about["main"], "lens": "contrast", "source": "Guo et al. 2024, arXiv 2410.13835",
        "definition": "mean attention on the sink in domain A minus in domain B",
        "pieces": [len(a), len(b)],
    }  # fmt: skip
    made = ContrastTable(table.sites, table.heads, columns, about)
    made.about["stability"] = None if np.isnan(made.stability) else made.stability  # type: ignore[index]
    return made


def _halved(model: nn.Module, pieces: Pieces, tick: Tick) -> list[HeadTable]:
    """Return the sinks of all pieces, and of either half where there are two pieces or more."""
    halves = [half for half in pieces.halves() if len(half)]
    lenses = [merged(model, half, tick, lambda place: (make("sinks", position=place),))[0] for half in halves]
    tables = [lens.result() for lens in lenses]
    if len(lenses) == 1:
        return tables
    lenses[0].merge(lenses[1])
    return [lenses[0].result(), *tables]


def _by_halves(parts: Mapping[str, list[HeadTable]]) -> dict[str, Any]:
    (_, a1, a2), (_, b1, b2) = ([table["first"] for table in found] for found in parts.values())
    return {"contrast_1": a1 - b1, "contrast_2": a2 - b2, "noise_a": a1 - a2, "noise_b": b1 - b2}
