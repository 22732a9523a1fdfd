"""One file from which a training goes on: weights, what the optimiser keeps, and the log.

`OUT/checkpoint.safetensors` is written beside itself and put in place in one move, so that a run that is
killed at any moment leaves the file before or the file after, and never a part of one.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regard.errors import RegardError
from regard.runtime.table import write_bytes

FILE = "checkpoint.safetensors"
VERSION = 1


@dataclass
class Log:
    """How a training went.

    Attributes:
        losses: of every step, in nats, on its own batch, before the step.
        held_out: (steps done, loss on the held-out part, in nats).
        measures: (steps done, what was measured then).
        seconds: spent in steps.
    """

    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    measures: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    seconds: float = 0.0

    def evaluated(self, step: int) -> bool:
        """Whether the held-out loss after so many steps is known."""
        return any(step == known for known, _ in self.held_out)

    def add(self, step: int, held_out: float, measures: dict[str, float]) -> None:
        """Write down what was measured after so many steps."""
        self.held_out.append((step, held_out))
        if measures:
            self.measures.append((step, measures))

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> Log:
        """Return the log that `dataclasses.asdict` described."""
        return cls(
            told["losses"],
            [(step, loss) for step, loss in told["held_out"]],
            [(step, found) for step, found in told["measures"]],
            told["seconds"],
        )


def folder_for(out: str | Path | None) -> Path | None:
    """Return the folder, made where it is missing.

    Raises:
        RegardError: where it cannot be made or written to.
    """
    if out is None:
        return None
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise RegardError(f"{folder} cannot be written to: {error.strerror or error}.") from None


class Checkpoint:
    """The file of a training in a folder; with `folder` None nothing is written or found.

    Args:
        folder: where.
        told: what the training is, as JSON holds it; a file of another is refused.
    """

    def __init__(self, folder: Path | None, told: dict[str, Any]) -> None:
        self.path = None if folder is None else folder / FILE
        for scratch in () if folder is None else folder.glob(f".{FILE}.*"):
            scratch.unlink(missing_ok=True)  # of a run that was killed while it wrote
        self.told = json.loads(json.dumps(told))

    def save(self, model: nn.Module, optimiser: torch.optim.Optimizer, log: Log) -> None:
        """Put the file in place, whole or not at all."""
        if self.path is None:
            return
        from safetensors.torch import save

        tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
        for number, state in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{k}": v for k, v in state.items()}
        alone = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
        note = {"version": str(VERSION), "told": json.dumps(self.told), "log": json.dumps(asdict(log))}
        write_bytes(self.path, save(alone, note))

    def restore(self, model: nn.Module, optimiser: torch.optim.Optimizer) -> Log | None:
        """Load model and optimiser from the file, and return the log; None where there is no file.

        Raises:
            RegardError: where the file cannot be read, or is of another training.
        """
        if self.path is None or not self.path.is_file():
            return None
        note, tensors = _read(self.path)
        self._check(json.loads(note["told"]))
        weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            first = str(error).splitlines()[1:2] or [str(error)]
            raise RegardError(f"{self.path} is of another model: {first[0].strip()}") from None
        state: dict[int, dict[str, Tensor]] = {}
        for name, x in tensors.items():
            if name.startswith("optimiser."):
                _, number, key = name.split(".", 2)
                state.setdefault(int(number), {})[key] = x
        optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
        return Log.from_dict(json.loads(note["log"]))

    def _check(self, found: dict[str, Any]) -> None:
        for name, value in _flat(self.told).items():
            other = _flat(found).get(name)
            if other != value:
                raise RegardError(
                    f"{self.path} is of another training: {name} was {other!r} there and is {value!r}; give "
                    "another folder, or resume=False (--no-resume) to begin anew."
                )


def _flat(told: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined by dots."""
    found: dict[str, Any] = {}
    for name, value in told.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as opened:
            note = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise RegardError(f"{path} cannot be read: {error}; give another folder, or resume=False.") from None
    if note.get("version") != str(VERSION) or not {"told", "log"} <= set(note):
        raise RegardError(f"{path} is no file of a training; give another folder, or resume=False.")
    return note, tensors
