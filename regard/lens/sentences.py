"""Words that the findings of several lenses share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from regard.runtime.findings import Finding
from regard.runtime.head_table import Head, HeadTable

STRONG = 0.4
MANY = 3


def strongest(table: HeadTable, target: str, name: str) -> tuple[Finding, ...]:
    """Heads with a score above 0.4, the strongest first, beside the score of evenly spread attention.

    Args:
        table: with the columns `score` and `chance`.
        target: what the score is attention to.
        name: what such heads are called, and the lens.
    """
    top = table.top("score", MANY)
    if not top:
        return (Finding(f"No row could see {target}, so nothing can be said of {name} heads.", (), name),)
    even = f"attention spread evenly would give {np.nanmean(table['chance']):.2f}"
    heads = where(table, "score", lambda score: score > STRONG)
    if not heads:
        said = (
            f"No head gives over {STRONG:.0%} of its attention to {target}: {head(top[0])} gives the most, "
        )
        return (Finding(said + f"{top[0][2]:.2f}; {even}.", (top[0][:2],), name),)
    best = f"{head(top[0])[0].upper()}{head(top[0])[1:]} is"
    best += f" the strongest of {len(heads)} {name} heads" if len(heads) > 1 else f" the one {name} head"
    rest = "".join(f", then {head(row)} {row[2]:.2f}" for row in top[1:] if row[2] > STRONG)
    said = f"{best}: {top[0][2]:.2f} of its attention goes to {target}{rest}; {even}."
    return (Finding(said, heads, name),)


def largest(table: HeadTable, column: str, words: str, lens: str) -> tuple[Finding, ...]:
    """The head of the largest value, beside the median head.

    Args:
        words: a sentence with places for the head and its value.
    """
    top = table.top(column, 1)
    if not top:
        return ()
    said = words.format(head(top[0]), size(top[0][2]))
    said += f"; the median head's is {size(float(np.nanmedian(table[column])))}."
    return (Finding(said, (top[0][:2],), lens),)


def where(
    table: HeadTable, column: str, holds: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.bool_]]
) -> tuple[Head, ...]:
    """The heads whose value in a column satisfies `holds`, the largest value first."""
    ranked = table.top(column, max(len(table), 1))
    kept = holds(np.array([value for _, _, value in ranked]))
    return tuple((site, number) for (site, number, _), keep in zip(ranked, kept, strict=True) if keep)


def head(row: tuple[str, int, float] | Head) -> str:
    """A head in words: layer 3 head 5."""
    return f"{layer(row[0])} head {row[1]}"


def layer(alias: str) -> str:
    """A site in words: `text.3` and `image.3` are layer 3, `cross.3` is cross layer 3."""
    kind, _, number = alias.rpartition(".")
    return f"{'layer' if kind in ('text', 'vision', 'image') else kind + ' layer'} {number}"


def token(position: int) -> str:
    """A token in words: the first token, the token at position 3."""
    return "the first token" if position == 0 else f"the token at position {position}"


def number(count: int, thing: str) -> str:
    """A number of things: 1 head, 2 heads."""
    return f"{count} {thing}{'s' * (count != 1)}"


def size(value: float) -> str:
    """A number to three digits, or whole from a hundred on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
