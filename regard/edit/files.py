"""Edits on disk: one small JSON file that knows the model its edits are for.

    {"format": "regard edits 1", "model": {...}, "edits": [{"name": "act", "options": {"beta": 0.2}}]}

Options are numbers, words, lists, heads and mappings of these, and tensors as nested lists. What is a
function cannot be written.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regard.edit.registry import EDITS, find_edit
from regard.errors import RegardError
from regard.runtime.anatomy import anatomy_of, root_of
from regard.runtime.model_identity import check_same, identify
from regard.runtime.protocol import Edit
from regard.runtime.table import write_text
from regard.runtime.verbs import steer

FORMAT = "regard edits 1"


def save_edits(path: str | Path, model: nn.Module, *edits: Edit) -> None:
    """Write edits, whole or not at all.

    Args:
        path: of the file, JSON.
        model: whose edits they are; its weights are not written.
        edits: registered ones, as `regard.steer` takes them.

    Raises:
        RegardError: for no edits, one that is not registered, or an option that JSON cannot hold.
        NoSuchSite: for an edit of a layer or head that the model does not have.

    Example:
        >>> regard.save_edits("calm.json", model, ACT([(5, 3)], beta=0.2))      # doctest: +SKIP
    """
    if not edits:
        raise RegardError("there are no edits to save.")
    steer(model, *edits)
    told = {"format": FORMAT, "model": identify(model), "edits": [_written(edit) for edit in edits]}
    write_text(path, json.dumps(told, indent=1, allow_nan=False) + "\n")


def load_edits(path: str | Path, model: nn.Module) -> list[Edit]:
    """Return the edits of a file, for `regard.steer(model, *edits)`.

    Raises:
        RegardError: for a file that cannot be read or holds no edits, one made for another model, or with an
            edit or option that is not known here.

    Example:
        >>> with regard.steer(model, *regard.load_edits("calm.json", model)):   # doctest: +SKIP
        ...     model.generate(**inputs)
    """
    try:
        told = json.loads(Path(path).read_text("utf-8"))
        if told["format"] != FORMAT:
            raise KeyError(told["format"])
        made_for, written = told["model"], [(each["name"], each["options"]) for each in told["edits"]]
    except OSError as failure:
        raise RegardError(f"cannot read {path}: {failure.strerror}.") from failure
    except (ValueError, KeyError, TypeError) as failure:
        raise RegardError(f"{path} holds no edits that regard saved.") from failure
    check_same(made_for, anatomy_of(root_of(model)), f"{path}", "fit them to it anew")
    return [_read(name, options, path) for name, options in written]


def _written(edit: Edit) -> dict[str, Any]:
    name = next((name for name, kind in EDITS.items() if type(edit) is kind), None)
    if name is None:
        raise RegardError(f"{type(edit).__name__} is not registered with @edit, so a file cannot name it.")
    options = {}
    for field in dataclasses.fields(edit):
        value = getattr(edit, field.name)
        if field.init and not _is_default(field, value):
            options[field.name] = _plain(value, f"{name} {field.name}")
    return {"name": name, "options": options}


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    if field.default is not dataclasses.MISSING:
        return value is field.default or (isinstance(value, str | int | float) and value == field.default)
    factory = field.default_factory
    return factory is not dataclasses.MISSING and isinstance(value, Sequence | Mapping) and not len(value)


def _plain(value: Any, what: str) -> Any:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return {"tensor": value.detach().cpu().tolist(), "dtype": kind}
    if isinstance(value, Mapping):
        return {"pairs": [[_plain(k, what), _plain(v, what)] for k, v in value.items()]}
    if isinstance(value, Sequence):
        return [_plain(each, what) for each in value]
    raise RegardError(f"{what} is a {type(value).__name__}, which a file of edits cannot hold.")


def _read(name: str, options: dict[str, Any], path: str | Path) -> Edit:
    kind = find_edit(name)
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    for option in options:
        if option not in known:
            raise RegardError(f"{path} gives {name} an option {option!r}, which it does not have.")
    return kind(**{key: _lively(value) for key, value in options.items()})


def _lively(value: Any, inside: bool = False) -> Any:
    """The value that was written; a list inside another one is a tuple, as heads are."""
    if isinstance(value, dict):
        if "tensor" in value:
            return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
        return {_lively(k, True): _lively(v) for k, v in value["pairs"]}
    if isinstance(value, list):
        found = [_lively(each, True) for each in value]
        return tuple(found) if inside else found
    return value
