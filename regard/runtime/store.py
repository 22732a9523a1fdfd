"""What lenses have seen, to and from one safetensors file."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.errors import RegardError
from regard.runtime.protocol import Lens

FORMAT = "regard-seen-1"


def save_seen(path: str | os.PathLike[str], lenses: Mapping[str, Lens], about: dict[str, Any]) -> None:
    """Write what `lenses` have seen; nothing is left behind where writing fails.

    Sums and counts are kept rather than results, so that files merge as lenses do.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    entries = []
    for number, (name, lens) in enumerate(lenses.items()):
        state, listing = lens.tally.export()
        tensors.update({f"{number}|{key}": value.contiguous().clone() for key, value in state.items()})
        kind = type(lens)
        entries.append(
            {
                "name": name,
                "class": f"{kind.__module__}:{kind.__qualname__}",
                "options": _options(lens),
                "tally": listing,
                "tensors": len(state),
            }
        )
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    try:
        save_file(
            tensors or {"empty": torch.zeros(1)},
            partial,
            {"format": FORMAT, "about": json.dumps(about), "lenses": json.dumps(entries)},
        )
        os.replace(partial, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RegardError(f"Cannot write {target}: {reason}.") from error
    finally:
        partial.unlink(missing_ok=True)


def load_seen(path: str | os.PathLike[str]) -> dict[str, Lens]:
    """Read lenses, by name, with all they had seen; `.result()` and `.merge()` work as before.

    Raises:
        RegardError: where the file is missing, damaged or not of this kind, or names a class that is no lens.
            A lens of your own is found where its module has been imported.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise RegardError(f"There is no file {path}.")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise RegardError(f"{path} is not a safetensors file: {error}.") from error
    if header.get("format") != FORMAT:
        raise RegardError(f"{path} was not written by regard: its format is {header.get('format')!r}.")
    try:
        entries = json.loads(header["lenses"])
        return {entry["name"]: _restored(number, entry, tensors) for number, entry in enumerate(entries)}
    except RegardError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise RegardError(
            f"{path} is damaged: {type(error).__name__} in what it says of its lenses."
        ) from error


def _restored(number: int, entry: dict[str, Any], tensors: dict[str, Tensor]) -> Lens:
    kind, options = _lens_class(entry["class"]), entry["options"]
    unknown = set(options) - {f.name for f in dataclasses.fields(kind) if f.init}
    if unknown:
        raise RegardError(
            f"The file gives {kind.__name__} options that it does not have: {', '.join(sorted(unknown))}."
        )
    lens = kind(**options)
    prefix = f"{number}|"
    state = {key[len(prefix) :]: t for key, t in tensors.items() if key.startswith(prefix)}
    if len(state) != entry["tensors"]:
        raise ValueError("tensors are missing")
    lens.tally.restore(state, entry["tally"])
    return lens


def _options(lens: Lens) -> dict[str, Any]:
    fields = [f.name for f in dataclasses.fields(lens) if f.init]
    return {name: value for name in fields if _plain(value := getattr(lens, name))}


def _plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _lens_class(spec: str) -> type[Lens]:
    module, _, name = spec.partition(":")
    try:
        if module.startswith("regard."):
            importlib.import_module(module)
        found = attrgetter(name)(sys.modules[module])
    except (ImportError, AttributeError, KeyError):
        found = None
    if not (isinstance(found, type) and issubclass(found, Lens)):
        raise RegardError(
            f"The file names {spec}, which is no lens of this version of regard or imported so far."
        )
    return found
