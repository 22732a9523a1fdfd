"""Edits that stay with a model after its session, and are saved with its config."""

from __future__ import annotations

import weakref

from torch import nn

from regard.runtime.protocol import Edit

_KEPT: weakref.WeakKeyDictionary[nn.Module, list[Edit]] = weakref.WeakKeyDictionary()


def permanent_edits(module: nn.Module) -> list[Edit]:
    """Return the edits kept on an attention module."""
    return _KEPT.get(module, [])


def keep(module: nn.Module, edit: Edit) -> None:
    """Keep `edit` on an attention module for as long as the module lives."""
    _KEPT.setdefault(module, []).append(edit)
