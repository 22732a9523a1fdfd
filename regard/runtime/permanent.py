"""Edits that stay with an attention module after their session, or were saved with its model's config."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from regard.errors import RegardError
from regard.runtime.implementation import NAME
from regard.runtime.protocol import Edit

KEY = "regard"
Resolver = Callable[[nn.Module], Edit | None]

_KEPT: weakref.WeakKeyDictionary[nn.Module, Edit | None] = weakref.WeakKeyDictionary()
_RESOLVERS: list[Resolver] = []


def permanent_edits(module: nn.Module) -> list[Edit]:
    """Return the edit kept on an attention module, or named by its config, as a list of one; or none."""
    if module not in _KEPT:
        found = (resolve(module) for resolve in _RESOLVERS)
        _KEPT[module] = next((edit for edit in found if edit is not None), None)
    edit = _KEPT[module]
    return [] if edit is None else [edit]


def keep(module: nn.Module, edit: Edit) -> None:
    """Keep `edit` on an attention module for as long as the module lives, in place of one kept before."""
    _KEPT[module] = edit


def resolve_with(resolver: Resolver) -> None:
    """Ask `resolver` about every attention module that is met for the first time."""
    _RESOLVERS.append(resolver)


class _Written:
    """The config attribute `regard`: a config that has it, when saved, asks for that attention."""

    def __get__(self, config: Any, owner: Any = None) -> Any:
        return self if config is None else config.__dict__.get(KEY)

    def __set__(self, config: Any, value: Any) -> None:
        if not isinstance(value, dict):
            raise RegardError(f"config.regard is {value!r}; regard itself writes it, as a dict.")
        config.__dict__[KEY] = value
        config.__dict__["attn_implementation"] = NAME


if not hasattr(PretrainedConfig, KEY):
    setattr(PretrainedConfig, KEY, _Written())
