"""What a comparison shows on the report's page: tokens of each text by method, agreement, faithfulness."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from regard.runtime.panels import MapPanel, TablePanel

if TYPE_CHECKING:
    from regard.lens.explanations.compared import Comparison

MOST_TEXTS = 8


def panels_of(told: Comparison) -> tuple[MapPanel | TablePanel, ...]:
    """Return maps of methods by tokens of the first eight texts, the matrix of agreement, and the tables."""
    found: list[MapPanel | TablePanel] = [_tokens(told, text) for text in range(min(len(told), MOST_TEXTS))]
    agreed = told.agreement()
    dropped = told.agreement(drop_first=True)
    found.append(
        MapPanel(
            title="Agreement of methods", rows=agreed.methods, columns=agreed.methods,
            values={agreed.measure: agreed.mean, "the first token left out": dropped.mean,
                    "reached by random scores": agreed.chance},
            note=" ".join(agreed.said()),
        )
    )  # fmt: skip
    if told.faithful:
        table = told.faithfulness
        found.append(TablePanel(title="Gained over random orders", table=table, note=str(table.title)))
    if len(told.errors):
        found.append(TablePanel(title="Completeness", table=told.errors, note=str(told.errors.title)))
    return tuple(found)


def _tokens(told: Comparison, text: int) -> MapPanel:
    """Scores of one text, each method's divided by its largest."""
    first = next(iter(told.explanations.values()))[text]
    lines = [
        of[text].values / max(np.abs(of[text].values).max(), 1e-300) for of in told.explanations.values()
    ]
    return MapPanel(
        title=f"Tokens of text {text + 1}: {first.target}", rows=told.methods, columns=first.tokens,
        values={"score": np.stack(lines)}, note="Signed scores, each method's divided by its largest.",
    )  # fmt: skip
