"""What `regard inspect` writes: all numbers as JSON, those per head as CSV."""

from __future__ import annotations

import json
import math
from typing import Any

from regard import __version__
from regard.cli.looking import Look
from regard.lens import LENSES
from regard.lens.column_mass import ColumnMassResult
from regard.lens.patterns import KeptPatterns
from regard.runtime.difference import heads_of
from regard.runtime.table import Table, finite

FORMAT = 1


def as_json(look: Look, main: dict[str, Any], probe: dict[str, Any]) -> str:
    """Return every number of the results, and what they were taken from; docs/look.md tells the keys.

    Args:
        look: the model and the text.
        main: results on the text, by name of the lens.
        probe: results on the random tokens.
    """
    document = {
        "format": FORMAT,
        "regard": __version__,
        "model": {
            "name": look.name,
            "class": type(look.model).__name__,
            "layers": look.layers,
            "heads": look.heads,
            "dtype": str(look.model.dtype).removeprefix("torch."),
            "device": str(look.ids.device),
        },
        "text": {"origin": look.origin, "tokens": look.tokens},
        "probe": {"origin": look.probe_words, "tokens": 2 * look.probe_length} if probe else None,
        "on_text": {name: _result(name, result) for name, result in main.items()},
        "on_probe": {name: _result(name, result) for name, result in probe.items()},
    }
    return _dump(document) + "\n"


def as_csv(main: dict[str, Any], probe: dict[str, Any]) -> str:
    """Return one line a head; columns are named `lens.column`, and `lens.column@probe`."""
    columns: dict[str, dict[tuple[str, int], float]] = {}
    heads: dict[tuple[str, int], None] = {}
    for suffix, results in (("", main), ("@probe", probe)):
        for lens, result in results.items():
            table = heads_of(result)
            if table is None:
                continue
            for column, values in table.columns.items():
                columns[f"{lens}.{column}{suffix}"] = dict(zip(table.names, values.tolist(), strict=True))
            heads.update(dict.fromkeys(table.names))
    names = {"site": [site for site, _ in heads], "head": [head for _, head in heads]}
    told = {name: [values.get(head, math.nan) for head in heads] for name, values in columns.items()}
    return Table({**names, **told}).to_csv()


def _result(name: str, result: Any) -> dict[str, Any]:
    kind: Any = LENSES[name]
    about = {"lens": name, "definition": kind.definition, "source": kind.source}
    table = heads_of(result)
    document: dict[str, Any] = {
        "about": {**about, **(table.about if table is not None else {})},
        "rows": [{key: finite(value) for key, value in row.items()} for row in result.table.rows()],
    }
    if isinstance(result, ColumnMassResult):
        document["mass"] = [
            {"site": site, "width": result.widths[site], "heads": _plain(mass)}
            for site, mass in result.mass.items()
        ]
    if isinstance(result, KeptPatterns):
        document["patterns"] = [
            {
                "site": site, "sequence": number, "heads": list(p.heads), "width": p.width,
                "tokens": None if p.tokens is None else p.tokens.tolist(),
                "weights": _plain(p.weights), "peaks": _plain(p.peaks) if p.width > 1 else None,
            }
            for site, patterns in result.kept.items()
            for number, p in enumerate(patterns)
        ]  # fmt: skip
    return document


def _plain(values: Any) -> Any:
    """An array or tensor as lists, with None for what is not a number."""

    def told(value: Any) -> Any:
        return [told(v) for v in value] if isinstance(value, list) else finite(value)

    return told(values.tolist())


def _dump(value: Any, indent: int = 0) -> str:
    """JSON in which whatever holds nothing nested stands on one line: a row, the keys of one head."""
    nested = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not any(isinstance(v, dict | list) and v for v in nested):
        return json.dumps(value, allow_nan=False)
    space = "\n" + " " * (indent + 1)
    if isinstance(value, dict):
        parts = [f"{json.dumps(k)}: {_dump(v, indent + 1)}" for k, v in value.items()]
        return "{" + space + ("," + space).join(parts) + "\n" + " " * indent + "}"
    return "[" + space + ("," + space).join(_dump(v, indent + 1) for v in value) + "\n" + " " * indent + "]"
