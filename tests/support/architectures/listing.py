"""Which modeling files of transformers route attention through its interface, and which class runs each."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin

MODELS = Path(transformers.__file__).parent / "models"
INTERFACE = re.compile(r"^[^#\n]*\bALL_ATTENTION_FUNCTIONS\.get_interface\(", re.MULTILINE)
ENDINGS = ("ForConditionalGeneration", "ForCausalLM", "LMHeadModel")
PARTS = (
    "Encoder", "Decoder", "TextModel", "VisionModel", "AudioModel", "Backbone", "Stack", "Wrapper",
    "PreTrainedModel", "PretrainedModel", "VQVAE",
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One modeling file.

    Attributes:
        name: the file's name between `modeling_` and `.py`.
        module: dotted name of the module.
    """

    name: str
    module: str

    def classes(self) -> list[type[PreTrainedModel]]:
        """Return the model classes that the file defines, in its order."""
        module = importlib.import_module(self.module)
        return [
            cls
            for cls in vars(module).values()
            if inspect.isclass(cls)
            and issubclass(cls, PreTrainedModel)
            and cls.__module__ == self.module
            and cls.config_class is not None
        ]

    def main_class(self) -> type[PreTrainedModel]:
        """Return the class that runs most of the file: what generates, else the whole model."""
        classes = [
            c for c in self.classes() if not c.__name__.endswith(("PreTrainedModel", "PretrainedModel"))
        ]
        generating = [c for c in classes if issubclass(c, GenerationMixin) and c.__name__.endswith(ENDINGS)]
        if generating:
            return max(generating, key=lambda c: (_composite(c), c.__name__.endswith(ENDINGS[0])))
        whole = [c for c in classes if c.__name__.endswith("Model") and not c.__name__.endswith(PARTS)]
        return max(whole or classes, key=_composite)


def _composite(cls: Any) -> int:
    return len(getattr(cls.config_class, "sub_configs_defaults", None) or {})


@cache
def architectures() -> dict[str, Architecture]:
    """Return every modeling file whose code asks the interface for its attention function, by name."""
    found = {}
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        if INTERFACE.search(path.read_text("utf-8")):
            name = path.stem.removeprefix("modeling_")
            found[name] = Architecture(name, f"transformers.models.{path.parent.name}.{path.stem}")
    return found
