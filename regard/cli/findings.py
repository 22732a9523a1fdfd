"""What a person would say of the numbers: sentences about heads, each with its control."""

from __future__ import annotations

from typing import Any

import numpy as np

SINK = 0.8
STRONG = 0.4
DRAINED = 0.5
PEAK = 2.0
MANY = 3


def sinks(table: Any) -> list[str]:
    """Heads whose mean attention on the first token, from the other rows, is above 0.8."""
    first = table["first"][np.isfinite(table["first"])]
    if not len(first):
        return ["No token but the first can see the first, so nothing can be said of a sink."]
    said = [
        f"{int((first > SINK).sum())} of {_heads(len(first))} put over {SINK:.0%} of their attention on the "
        f"first token; the mean over all heads is {first.mean():.0%}."
    ]
    if table.windowed:
        said.append(
            f"In {_number(len(table.windowed), 'layer')} a sliding window hides the first token from some "
            "rows, which do not count there."
        )
    if table.bos is not None:
        said.append(f"The text {'began' if table.bos else 'did not begin'} with a BOS token.")
    return said


def value_norm(table: Any) -> list[str]:
    """Heads whose value at the first token is less than half as large as at the others."""
    drain = table["drain"][np.isfinite(table["drain"])]
    if not len(drain):
        return []
    return [
        f"In {int((drain < DRAINED).sum())} of {_heads(len(drain))} the first token's value is less than "
        f"half as large as the others' (a value drain); the median ratio is {np.median(drain):.2f}."
    ]


def residual_norm(norms: Any) -> list[str]:
    """The block after which the first token's residual stream stands out most."""
    peaks = np.asarray(norms.table["peak"])
    if not np.isfinite(peaks).any():
        return []
    at = int(np.nanargmax(peaks))
    layer = _layer(norms.table["block"][at])
    if peaks[at] <= PEAK:
        return [
            f"No residual peak: the first token's norm is at most {peaks[at]:.1f} times the largest other, "
            f"after {layer}."
        ]
    first, other = norms.table["first"][at], norms.table["largest_other"][at]
    return [
        f"The residual stream peaks at the first token: after {layer} its norm is {_size(first)}, the "
        f"largest other {_size(other)}."
    ]


def entropy(table: Any) -> list[str]:
    """The most focused and the most even head."""
    low, high = table.top("normalised", 1, largest=False), table.top("normalised", 1)
    if not low:
        return []
    return [
        f"The most focused head is {_head(low[0])}, at {low[0][2]:.0%} of the greatest possible entropy; the "
        f"most even is {_head(high[0])}, at {high[0][2]:.0%}."
    ]


def mean_distance(table: Any) -> list[str]:
    """The head that looks furthest, beside the median head."""
    return _largest(table, "distance", "The head that looks furthest is {}, {} tokens away on average")


def head_output_norm(table: Any) -> list[str]:
    """The head that adds most to the residual stream, beside the median head."""
    return _largest(table, "norm", "The head that writes most is {}, with a mean norm of {}")


def _largest(table: Any, column: str, words: str) -> list[str]:
    top = table.top(column, 1)
    if not top:
        return []
    return [
        words.format(_head(top[0]), _size(top[0][2]))
        + f"; the median head's is {_size(np.nanmedian(table[column]))}."
    ]


def induction(table: Any) -> list[str]:
    """Heads that look at what followed the current token earlier."""
    return _strongest(table, "what followed the same token earlier", "induction")


def previous_token(table: Any) -> list[str]:
    """Heads that look at the token before."""
    return _strongest(table, "the token just before", "previous-token")


def duplicate_token(table: Any) -> list[str]:
    """Heads that look at earlier occurrences of the current token."""
    return _strongest(table, "the same token earlier", "duplicate-token")


def _strongest(table: Any, target: str, name: str) -> list[str]:
    """Heads with a score above 0.4, the strongest first, beside the score of evenly spread attention."""
    top = table.top("score", MANY)
    if not top:
        return [f"No row could see {target}, so nothing can be said of {name} heads."]
    even = f"attention spread evenly would give {np.nanmean(table['chance']):.2f}"
    count = int((table["score"] > STRONG).sum())
    if not count:
        return [
            f"No head gives over {STRONG:.0%} of its attention to {target}: {_head(top[0])} gives the most, "
            f"{top[0][2]:.2f}; {even}."
        ]
    best = f"{_head(top[0])[0].upper()}{_head(top[0])[1:]} is"
    best += f" the strongest of {count} {name} heads" if count > 1 else f" the one {name} head"
    rest = "".join(f", then {_head(head)} {head[2]:.2f}" for head in top[1:] if head[2] > STRONG)
    return [f"{best}: {top[0][2]:.2f} of its attention goes to {target}{rest}; {even}."]


def _head(row: tuple[str, int, float]) -> str:
    return f"{_layer(row[0])} head {row[1]}"


def _layer(alias: str) -> str:
    kind, _, layer = alias.partition(".")
    return f"{'layer' if kind in ('text', 'vision') else kind + ' layer'} {layer}"


def _number(count: int, thing: str) -> str:
    return f"{count} {thing}{'s' * (count != 1)}"


def _heads(count: int) -> str:
    return _number(count, "head")


def _size(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


FINDINGS = {
    "sinks": sinks,
    "value-norm": value_norm,
    "residual-norm": residual_norm,
    "entropy": entropy,
    "mean-distance": mean_distance,
    "head-output-norm": head_output_norm,
}
PROBE_FINDINGS = {
    "induction": induction,
    "previous-token": previous_token,
    "duplicate-token": duplicate_token,
}
