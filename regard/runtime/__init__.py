"""How regard meets a pretrained model: sessions, calls, points and the parts of a model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "Edit": "protocol",
    "HeadTable": "head_table",
    "Lens": "protocol",
    "Pair": "pairs",
    "PairResults": "pairs",
    "Point": "site",
    "Replay": "replay",
    "RowPatch": "row_patch",
    "Session": "session",
    "Site": "site",
    "Wanted": "protocol",
    "activation_patch": "activations",
    "attribute_logits": "attribution",
    "collect": "row_patch",
    "load_seen": "store",
    "logit_difference": "pairs",
    "patch": "verbs",
    "path_patch": "paths",
    "resolve": "tokens",
    "run_pairs": "pairs",
    "steer": "verbs",
    "watch": "verbs",
}

if TYPE_CHECKING:
    from regard.runtime.activations import activation_patch
    from regard.runtime.attribution import attribute_logits
    from regard.runtime.head_table import HeadTable
    from regard.runtime.pairs import Pair, PairResults, logit_difference, run_pairs
    from regard.runtime.paths import path_patch
    from regard.runtime.protocol import Edit, Lens, Wanted
    from regard.runtime.replay import Replay
    from regard.runtime.row_patch import RowPatch, collect
    from regard.runtime.session import Session
    from regard.runtime.site import Point, Site
    from regard.runtime.store import load_seen
    from regard.runtime.tokens import resolve
    from regard.runtime.verbs import patch, steer, watch

__all__ = [
    "Edit", "HeadTable", "Lens", "Pair", "PairResults", "Point", "Replay", "RowPatch", "Session", "Site",
    "Wanted", "activation_patch", "attribute_logits", "collect", "load_seen", "logit_difference", "patch",
    "path_patch", "resolve", "run_pairs", "steer", "watch",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"regard.runtime.{_HOME[name]}"), name)
    raise AttributeError(f"module 'regard.runtime' has no attribute {name!r}")
