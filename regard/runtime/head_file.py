"""Head tables on disk: JSON, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regard.errors import RegardError
from regard.runtime.table import write_text

if TYPE_CHECKING:
    from regard.runtime.head_table import HeadTable

FORMAT = "regard head table 1"


def write(table: HeadTable, path: str | Path) -> None:
    """Write a table; see `HeadTable.save`."""
    content = {
        "format": FORMAT,
        "about": dict(table.about),
        "sites": list(table.sites),
        "heads": table.heads.tolist(),
        "columns": {name: [_to_json(v) for v in c] for name, c in table.columns.items()},
    }
    try:
        text = json.dumps(content, allow_nan=False)
    except (TypeError, ValueError) as failure:
        raise RegardError(f"`about` holds what JSON cannot write: {failure}.") from failure
    write_text(path, text + "\n")


def read(path: str | Path) -> dict[str, Any]:
    """Return the fields of the table saved at `path`; see `HeadTable.load`."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise KeyError(content["format"])
        return {
            "sites": tuple(content["sites"]),
            "heads": np.array(content["heads"], dtype=np.int64),
            "columns": {k: np.array([_from_json(x) for x in v]) for k, v in content["columns"].items()},
            "about": content["about"],
        }
    except OSError as failure:
        raise RegardError(f"cannot read {path}: {failure.strerror}.") from failure
    except (ValueError, KeyError, TypeError) as failure:
        raise RegardError(f"{path} is not a head table that regard saved.") from failure


def _to_json(value: float) -> float | str | None:
    if np.isnan(value):
        return None
    return float(value) if np.isfinite(value) else str(float(value))


def _from_json(value: float | str | None) -> float:
    return float("nan") if value is None else float(value)
