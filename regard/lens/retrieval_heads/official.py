"""Retrieval scores in the form of the official code: a JSON object {"layer-head": [score of each prompt]}.

Source: github.com/nightdessert/Retrieval_Head, `head_score/*.json` (Wu et al., 2024, arXiv 2404.15574).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from regard.errors import RegardError
from regard.lens.retrieval_heads.scores import RetrievalScores
from regard.runtime.head_table import HeadTable, split
from regard.runtime.table import write_text


def write_official(scores: RetrievalScores, path: str | Path) -> None:
    """Write the scores of every counted prompt, whole or not at all.

    Raises:
        RegardError: where the path cannot be written.
    """
    told = {
        f"{split(site)[1]}-{head}": scores.each[:, row].tolist()
        for row, (site, head) in enumerate(scores.names)
    }
    write_text(path, json.dumps(told) + "\n")


def read_official(path: str | Path) -> HeadTable:
    """Read such a file as a table: `score`, the mean of each head, and `active`, its share above 0.

    Raises:
        RegardError: where it cannot be read, or is no such file; where no prompt was counted.
    """
    try:
        told: dict[str, Any] = json.loads(Path(path).read_text("utf-8"))
        found = {tuple(map(int, key.split("-"))): np.asarray(v, dtype=np.float64) for key, v in told.items()}
        rows = sorted((layer, head) for layer, head in found)
    except OSError as error:
        raise RegardError(f"cannot read {path}: {error.strerror}.") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise RegardError(f'{path} is no file of scores {{"layer-head": [...]}}.') from error
    if not rows or any(not len(values) for values in found.values()):
        raise RegardError(f"{path} counts no prompt: its lists are empty.")
    columns = {
        "score": np.array([found[row].mean() for row in rows]),
        "active": np.array([(found[row] > 0).mean() for row in rows]),
    }
    sites = tuple(f"text.{layer}" for layer, _ in rows)
    return HeadTable(
        sites, np.array([head for _, head in rows]), columns, {"lens": "retrieval", "main": "text"}
    )
