"""regard: look inside, steer and rebuild the attention of PyTorch and Hugging Face models.

Nothing heavy is imported until a name is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from regard import _transformers

__version__ = "0.1.0"

_HOME = {
    "load": "regard.weights",
    "watch": "regard.runtime.verbs",
    "load_edits": "regard.edit.files",
    "save_edits": "regard.edit.files",
    "steer": "regard.runtime.verbs",
    "swap": "regard.attention.swap",
    "unswap": "regard.attention.kept",
    "patch": "regard.runtime.verbs",
    "Point": "regard.runtime.site",
    "Prompt": "regard.runtime.prompt",
    "encode_prompts": "regard.runtime.prompt",
    "score_options": "regard.runtime.option_scores",
    "Lens": "regard.runtime.protocol",
    "Edit": "regard.runtime.protocol",
    "Wanted": "regard.runtime.protocol",
}

if TYPE_CHECKING:
    from regard.attention.kept import unswap
    from regard.attention.swap import swap
    from regard.edit.files import load_edits, save_edits
    from regard.runtime.option_scores import score_options
    from regard.runtime.prompt import Prompt, encode_prompts
    from regard.runtime.protocol import Edit, Lens, Wanted
    from regard.runtime.site import Point
    from regard.runtime.verbs import patch, steer, watch
    from regard.weights import load

__all__ = [
    "Edit",
    "Lens",
    "Point",
    "Prompt",
    "Wanted",
    "encode_prompts",
    "load",
    "load_edits",
    "patch",
    "save_edits",
    "score_options",
    "steer",
    "swap",
    "unswap",
    "watch",
]

_transformers.when_loaded("regard.attention.register")


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'regard' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
