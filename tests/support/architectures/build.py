"""A tiny model of an architecture with its inputs, by general rules and what its family adds to them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.generation import GenerationMixin

from tests.support.architectures.families import FAMILIES
from tests.support.architectures.family import Family
from tests.support.architectures.inputs import BATCH, fresh, inputs_of
from tests.support.architectures.listing import Architecture
from tests.support.architectures.shrink import WIDTH, tiny_config
from tests.support.architectures.weights import draw


@dataclass
class Tiny:
    """A tiny model.

    Attributes:
        placeholders: image or audio tokens of a sequence, found by `fit`.
    """

    model: Any
    family: Family
    placeholders: int = 4

    @property
    def generates(self) -> bool:
        return isinstance(self.model, GenerationMixin) and self.family.generates

    @property
    def has_sdpa(self) -> bool:
        return bool(self.model._supports_sdpa)

    def inputs(self, padding: bool = False) -> dict[str, Any]:
        """Return keyword arguments of a forward."""
        return inputs_of(self.model, padding, self.placeholders, self.family.given, self.family.drop)

    def fit(self) -> dict[str, Any]:
        """Return inputs with as many placeholders as the model asks for, by its own error message."""
        for attempt in range(3):
            try:
                self._try()
            except ValueError as error:
                numbers = re.search(r"tokens:? (\d+).*?features:? (\d+)", str(error))
                if numbers is None or attempt == 2:
                    raise
                counted = max(int(numbers[1]) // (self.placeholders * BATCH), 1)
                asked = int(numbers[2]) // counted // BATCH
                self.placeholders = asked if attempt == 0 else asked // WIDTH
        return self.inputs()

    def _try(self) -> None:
        with torch.no_grad():
            torch.manual_seed(11)
            self.model(**fresh(self.inputs()))


def tiny(architecture: Architecture) -> Tiny:
    """Return the tiny model of an architecture, its weights drawn by a fixed seed."""
    family = FAMILIES.get(architecture.name, Family())
    cls = architecture.main_class()
    if family.cls:
        cls = getattr(transformers, family.cls, None) or next(
            c for c in architecture.classes() if c.__name__ == family.cls
        )
    torch.manual_seed(0)
    config = tiny_config(cls.config_class, family.config, attn_implementation="eager")
    model = draw(cls(config))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        if model.config.is_encoder_decoder and model.generation_config.decoder_start_token_id is None:
            model.generation_config.decoder_start_token_id = 1
    return Tiny(model, family)
