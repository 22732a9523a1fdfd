"""What a long search has found so far, kept in a file, so that one that was stopped goes on from there.

A file may hold several searches. Each is told by what was asked for, and by how the prompts score before
anything is patched: another model, other weights or another metric score otherwise.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from regard.errors import RegardError
from regard.runtime.table import write_text

FORMAT = "regard search 1"
EVERY = 5.0


class Resumable:
    """Numbers by name, written to a file every few seconds and on leaving, also by Ctrl-C.

    Args:
        path: the file; None keeps nothing.
        asked: what tells this search from others, as JSON takes it.
        scores: of the prompts before anything is patched, [...].

    Raises:
        RegardError: for a file that is no such file, or that holds this search of another model or metric.
    """

    def __init__(self, path: str | Path | None, asked: Mapping[str, Any], scores: Tensor) -> None:
        self.path = None if path is None else Path(path)
        self.name = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
        self.scores = scores.flatten().tolist()
        self.written = time.monotonic()
        self.found: dict[str, list[float]] = {}
        if self.path is not None:
            self._read(self.path)

    def __enter__(self) -> Resumable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write()

    def get(self, name: str) -> Tensor | None:
        """Return what was kept under a name, float32, or None."""
        found = self.found.get(name)
        return None if found is None else torch.tensor(found, dtype=torch.float32)

    def put(self, name: str, values: Tensor) -> None:
        """Keep numbers [N] under a name."""
        if self.path is None:
            return
        self.found[name] = values.float().tolist()
        if time.monotonic() - self.written > EVERY:
            self._write()

    def _read(self, path: Path) -> None:
        search = _searches(path).get(self.name)
        if search is None:
            write_text(path, json.dumps({"format": FORMAT, "searches": self._with(_searches(path))}) + "\n")
            return
        kept = torch.tensor(search["scores"])
        if kept.shape != (len(self.scores),) or not torch.allclose(
            kept, torch.tensor(self.scores), rtol=1e-3, atol=1e-3
        ):
            raise RegardError(
                f"{path} holds this search of another model or metric: the prompts scored "
                f"{float(kept.mean()):.4f} there and score {sum(self.scores) / len(self.scores):.4f} now; "
                "take another file."
            )
        self.found = search["found"]

    def _with(self, searches: dict[str, Any]) -> dict[str, Any]:
        return {**searches, self.name: {"scores": self.scores, "found": self.found}}

    def _write(self) -> None:
        if self.path is None:
            return
        write_text(
            self.path, json.dumps({"format": FORMAT, "searches": self._with(_searches(self.path))}) + "\n"
        )
        self.written = time.monotonic()


def _searches(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["format"] != FORMAT:
            raise KeyError(content["format"])
        searches: dict[str, Any] = content["searches"]
        return searches
    except OSError as failure:
        raise RegardError(f"cannot read {path}: {failure.strerror}.") from failure
    except (ValueError, KeyError, TypeError) as failure:
        raise RegardError(f"{path} holds no search that regard kept; take another file.") from failure
