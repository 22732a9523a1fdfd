"""Edits that stay with an attention module after their session, or were saved with its model's config."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from regard.errors import RegardError
from regard.runtime.implementation import NAME, outside
from regard.runtime.protocol import Edit

KEY = "regard"
Resolver = Callable[[nn.Module], None]
Undo = Callable[[], None]

_KEPT: weakref.WeakKeyDictionary[nn.Module, tuple[Edit, Undo | None] | None] = weakref.WeakKeyDictionary()
_RESOLVERS: list[Resolver] = []


def permanent_edits(module: nn.Module) -> list[Edit]:
    """Return the edit kept on an attention module, or named by its config, as a list of one; or none."""
    if not in_force(module):
        return []
    edit = kept_edit(module)
    return [] if edit is None else [edit]


def in_force(module: nn.Module) -> bool:
    """Whether what is kept on a module is in force: outside of sessions its config asks for regard.

    `set_attn_implementation("sdpa")` so switches a kept edit off, and "regard" on again.
    """
    config = getattr(module, "config", None)
    return config is not None and outside(config) == NAME


def kept_edit(module: nn.Module) -> Edit | None:
    """Return the edit kept on a module, or named by its config, in force or not."""
    if module not in _KEPT:
        _KEPT[module] = None
        try:
            for resolve in _RESOLVERS:
                resolve(module)
        except BaseException:
            del _KEPT[module]
            raise
    kept = _KEPT[module]
    return None if kept is None else kept[0]


def keep(module: nn.Module, edit: Edit, undo: Undo | None = None) -> None:
    """Keep `edit` on an attention module for as long as the module lives, in place of one kept before.

    Neither `edit` nor `undo` may hold the module itself, or it would live for ever.

    Args:
        undo: called where the edit is replaced or dropped.
    """
    drop(module)
    _KEPT[module] = edit, undo


def drop(module: nn.Module) -> None:
    """Forget what is kept on a module; its config is then asked again."""
    kept = _KEPT.pop(module, None)
    if kept is not None and kept[1] is not None:
        kept[1]()


def resolve_with(resolver: Resolver) -> None:
    """Ask `resolver` about every module that is met for the first time; it calls `keep` where it knows."""
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

    def __delete__(self, config: Any) -> None:
        config.__dict__.pop(KEY, None)
        config.__dict__.pop("attn_implementation", None)


if not hasattr(PretrainedConfig, KEY):
    setattr(PretrainedConfig, KEY, _Written())
