"""What a person would say of the numbers: sentences about heads, each with its control."""

from __future__ import annotations

from typing import Any

import numpy as np

SINK = 0.8
STRONG = 0.4
DRAINED = 0.5
MANY = 3


def sinks(table: Any) -> list[str]:
    """Heads whose mean attention on the first token, from the other rows, is above 0.8."""
    first = table["first"]
    count, total = int((first > SINK).sum()), int(np.isfinite(first).sum())
    said = [
        f"{count} of {total} heads put over {SINK:.0%} of their attention on the first token; "
        f"the mean over all heads is {np.nanmean(first):.0%}."
    ]
    if table.bos is not None:
        said.append("The text began with a BOS token." if table.bos else "No BOS token stood in front of it.")
    return said


def _strongest(table: Any, verb: str) -> list[str]:
    """Heads with a score above 0.4, the strongest first, beside the score of evenly spread attention."""
    top = [head for head in table.top("score", MANY) if head[2] > STRONG]
    chance = float(np.nanmean(table["chance"]))
    if not top:
        best = table.top("score", 1)[0]
        return [f"No head {verb}: the highest score is {best[2]:.2f} (even attention: {chance:.2f})."]
    count = int((table["score"] > STRONG).sum())
    names = ", ".join(f"{_words(alias, head)} ({score:.2f})" for alias, head, score in top)
    number = "1 head" if count == 1 else f"{count} heads"
    more = "" if count <= MANY else ", first of all"
    return [f"{number} {verb}{'s' if count == 1 else ''}{more}: {names}; even attention: {chance:.2f}."]


def induction(table: Any) -> list[str]:
    """Heads that look at what followed the current token earlier."""
    top = table.top("score", 1)[0]
    said = _strongest(table, "complete a repetition")
    said[0] = said[0].replace("completes a repetition", "completes a repetition (induction)")
    if top[2] > STRONG:
        said.insert(0, f"{_words(top[0], top[1]).capitalize()} is an induction head, {top[2]:.2f}.")
    return said


def previous_token(table: Any) -> list[str]:
    """Heads that look at the token before."""
    return _strongest(table, "look at the previous token")


def duplicate_token(table: Any) -> list[str]:
    """Heads that look at earlier occurrences of the current token."""
    return _strongest(table, "look at an earlier occurrence of the same token")


def value_norm(table: Any) -> list[str]:
    """Heads whose value at the first token is less than half as large as at the others."""
    drain = table["drain"]
    return [
        f"In {int((drain < DRAINED).sum())} of {int(np.isfinite(drain).sum())} heads the first token's value "
        f"is less than half as large as the others' (a value drain); the median ratio is "
        f"{np.nanmedian(drain):.2f}."
    ]


def residual_norm(norms: Any) -> list[str]:
    """The block after which the first token's residual stream stands out most."""
    peaks = norms.table["peak"]
    at = int(np.nanargmax(peaks))
    first, others = norms.table["first"][at], norms.table["largest_other"][at]
    if peaks[at] <= 2:
        return [
            f"No residual peak: after no block is the first token's norm twice the others' ({peaks[at]:.1f})."
        ]
    return [
        f"The residual stream peaks at the first token: after {norms.table['block'][at]} its norm is "
        f"{first:,.0f}, the largest other {others:,.0f}."
    ]


def entropy(table: Any) -> list[str]:
    """The most focused and the most even head."""
    (low,) = table.top("normalised", 1, largest=False)
    (high,) = table.top("normalised", 1)
    return [
        f"The most focused head is {_words(low[0], low[1])}, with {low[2]:.0%} of the greatest possible "
        "entropy; "
        f"the most even is {_words(high[0], high[1])}, with {high[2]:.0%}."
    ]


def _words(alias: str, head: int) -> str:
    kind, _, layer = alias.partition(".")
    return f"{'layer' if kind in ('text', 'vision') else kind + ' layer'} {layer} head {head}"


FINDINGS = {
    "sinks": sinks,
    "value-norm": value_norm,
    "residual-norm": residual_norm,
    "entropy": entropy,
}
PROBE_FINDINGS = {
    "induction": induction,
    "previous-token": previous_token,
    "duplicate-token": duplicate_token,
}
