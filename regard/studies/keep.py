"""The results of finished steps, kept in files, so that a study that was stopped goes on after them.

A step's file is `OUT/SLUG.steps/STEP.json`, written whole or not at all. It carries a key, and is used again
only by a run with the same key: the same study, step, size, seed, versions of Python, torch, transformers
and numpy, processor and accelerator, and the same code. The code is all of regard, its data included, less
the command line, the report, the catalogue, the other studies and files named `*picture.py`. In the study's
own file everything counts but what comes after the steps (claims, quantities, measure, details, draw), so
that a picture can be changed without running anything again.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import re
import time
from pathlib import Path
from typing import Any

import regard
from regard.errors import RegardError
from regard.runtime.table import write_text
from regard.studies.base import JUDGING, Step, Study

NOT_COUNTED = ("cli", "report", "papers", "papers.py", "papers.toml")
STALE = 24 * 3600


class Keep:
    """A folder of results; with `folder` None nothing is kept or found.

    Args:
        folder: `OUT/SLUG.steps`, or None.
        key: what all results of this run depend on, as JSON takes it.
    """

    def __init__(self, folder: Path | None, key: dict[str, Any]) -> None:
        self.folder = folder
        self.key = key

    def find(self, step: Step) -> dict[str, Any] | None:
        """Return `{"result": ..., "seconds": ...}` of a step that was finished under the same key."""
        path = self._path(step)
        if path is None or not path.is_file():
            return None
        try:
            kept = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            return None
        same = isinstance(kept, dict) and kept.get("key") == self._key(step)
        return {"result": kept["result"], "seconds": kept["seconds"]} if same else None

    def put(self, step: Step, result: Any, seconds: float) -> None:
        """Keep the result of a step."""
        path = self._path(step)
        if path is not None:
            kept = {"key": self._key(step), "step": step.name, "seconds": seconds, "result": result}
            write_text(path, json.dumps(kept) + "\n")

    def rules(self, now: Any, begun: bool) -> bool:
        """Return whether the rules are those that were written down before the first step ran.

        Args:
            now: the rules as they are, plain data.
            begun: whether results of this run's key are kept already.
        """
        if self.folder is None:
            return True
        path = self.folder / "rules.json"
        told = {"key": self._digest("rules"), "rules": now}
        try:
            before = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            before = None
        if begun:
            return bool(before == told)
        write_text(path, json.dumps(told, indent=1) + "\n")
        return True

    def open(self) -> None:
        """Make the folder, and remove what writers that were killed long ago left in it."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".*"):
            if time.time() - left.stat().st_mtime > STALE:
                left.unlink(missing_ok=True)

    def _path(self, step: Step) -> Path | None:
        return None if self.folder is None else self.folder / f"{file_name(step.name)}.json"

    def _key(self, step: Step) -> str:
        return self._digest(step.name)

    def _digest(self, name: str) -> str:
        told = json.dumps([name, self.key], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()


def file_name(step: str) -> str:
    """Return a step's name as a file takes it.

    Example:
        >>> file_name("random tokens, seed 3")
        'random-tokens-seed-3'
    """
    return re.sub(r"[^a-z0-9.]+", "-", step.lower()).strip("-.")


def check_steps(steps: list[Step]) -> None:
    """Refuse steps that share a file, and none at all.

    Raises:
        RegardError: naming them.
    """
    if not steps:
        raise RegardError("the study has no steps.")
    seen: dict[str, str] = {"rules": "the list of rules"}
    for step in steps:
        name = file_name(step.name)
        if not name or name in seen:
            raise RegardError(f"step {step.name!r} needs a name of its own; {seen.get(name)} has it.")
        seen[name] = repr(step.name)


def code_of(kind: type[Study]) -> str | None:
    """Return a hash of the code that a study's steps depend on; None where its source cannot be read."""
    try:
        own = own_code(inspect.getsource(inspect.getmodule(kind) or kind), kind.__name__)
    except (OSError, TypeError):
        return None
    root = Path(regard.__file__).parent
    digest = hashlib.sha256(own.encode())
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if not path.is_file() or parts[0] in NOT_COUNTED or "__pycache__" in parts:
            continue
        content = path.read_bytes()
        if parts[0] == "studies" and path.stem.endswith("picture"):
            continue
        if parts[0] == "studies" and re.search(rb"^@study\(", content, re.MULTILINE):
            continue
        digest.update("/".join(parts).encode() + b"\0" + content + b"\0")
    return digest.hexdigest()


def own_code(source: str, name: str) -> str:
    """Return a study's file without comments and layout, and without what comes after the steps."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            node.body = [part for part in node.body if not _names(part) & set(JUDGING)]
    return ast.dump(tree)


def _names(node: ast.stmt) -> set[str]:
    """What a statement of a class body defines."""
    if isinstance(node, ast.FunctionDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}
