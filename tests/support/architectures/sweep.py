"""Many architectures, each in a process of its own that may crash or hang alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

TIMEOUT = 150.0


def sweep(
    names: Iterable[str],
    path: Path,
    jobs: int = 2,
    timeout: float = TIMEOUT,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, dict[str, Any]]:
    """Examine architectures, appending each row to a file of JSON lines; those in it are not run again.

    Args:
        names: modeling files, as `architectures()` names them.
        path: the file.
        jobs: how many run at a time, one thread each.
        timeout: seconds after which one is given up.
        report: called with each new row.
    """
    rows = read(path)
    waiting = [name for name in names if name not in rows]
    context = multiprocessing.get_context("fork")
    running: dict[str, tuple[Any, Any, float]] = {}
    _warm()
    with path.open("a", encoding="utf-8") as file:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                here, there = context.Pipe(False)
                worker = context.Process(target=_work, args=(name, there), daemon=True)
                worker.start()
                there.close()
                running[name] = (worker, here, time.monotonic())
            time.sleep(0.02)
            for name, (worker, pipe, since) in list(running.items()):
                row = _finished(name, worker, pipe, time.monotonic() - since, timeout)
                if row is not None:
                    del running[name]
                    rows[name] = row
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                    report(row)
    return rows


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a file of JSON lines, by name; the last of a name counts."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {row["name"]: row for row in map(json.loads, lines)}


def _finished(name: str, worker: Any, pipe: Any, seconds: float, timeout: float) -> dict[str, Any] | None:
    row: dict[str, Any] = {"name": name, "class": "", "verdict": "not built", "seconds": round(seconds, 1)}
    if pipe.poll():
        try:
            row = pipe.recv()
        except EOFError:
            worker.join()
            row["reason"] = f"the process died (exit code {worker.exitcode})"
    elif not worker.is_alive():
        row["reason"] = f"the process died (exit code {worker.exitcode})"
    elif seconds > timeout:
        worker.kill()
        row["reason"] = f"not done after {timeout:.0f} s"
    else:
        return None
    worker.join()
    return row


def _warm() -> None:
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import tests.support.architectures.examine  # noqa: F401

    torch.set_num_threads(1)


def _work(name: str, pipe: Any) -> None:
    import torch

    from tests.support.architectures.examine import examine

    torch.set_num_threads(1)
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        pipe.send(examine(name))
    pipe.close()
