"""Whether a model can read a text, told from its config, tokenizer and shapes before weights are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.errors import RegardError, UnsupportedModel
from regard.runtime.anatomy import Anatomy
from regard.weights import Source

LIMITS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")


def check_reads_text(found: Source) -> None:
    """Refuse a model that one text does not feed.

    Raises:
        UnsupportedModel: naming what it takes.
    """
    name = found.name
    if getattr(found.config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{name} is an encoder-decoder, and inspect reads one text; watch it in Python with both."
        )
    if found.tokenizer is None:
        kind = (found.config.architectures or [type(found.config).__name__])[0]
        raise UnsupportedModel(
            f"{name} ({kind}) takes images; give one with --image FILE."
            if found.reads == "pixel_values"
            else f"{name} ({kind}) comes without a tokenizer, and inspect reads text; watch it in Python."
        )


def check_takes_tokens(skeleton: Any, anatomy: Anatomy, name: str) -> int:
    """Return how many tokens a model knows.

    Raises:
        UnsupportedModel: where it takes none.
    """
    weight = getattr(anatomy.embedding, "weight", None)
    takes = getattr(skeleton, "main_input_name", "input_ids")
    if takes != "input_ids":
        wanted = f"{takes}, not tokens"
    elif not skeleton.can_generate() and hasattr(skeleton.config, "vision_config"):
        wanted = "an image beside its text"
    elif isinstance(weight, Tensor) and weight.ndim == 2:
        return weight.shape[0]
    else:
        wanted = "no tokens"
    what_to_do = "look at it with --image FILE" if takes == "pixel_values" else "watch it in Python"
    raise UnsupportedModel(
        f"{name} ({type(skeleton).__name__}) takes {wanted}, and inspect reads one text; {what_to_do}."
    )


def check_vocabulary(ids: Tensor, known: int, name: str) -> None:
    """Refuse a tokenizer that is another model's, where it shows.

    Raises:
        RegardError: where it gives a token that the model does not know.
    """
    if int(ids.max()) >= known:
        raise RegardError(
            f"The tokenizer of {name} gives token {int(ids.max())}, and the model knows {known}: the two do "
            "not belong together."
        )


def check_length(length: int, longest: int | None, name: str) -> None:
    """Refuse a text of fewer than two tokens, or of more than a model takes.

    Raises:
        RegardError: naming both numbers.
    """
    if longest is not None and length > longest:
        raise RegardError(f"The text has {length} tokens, and {name} takes at most {longest}.")
    if length < 2:
        raise RegardError(f"The text has {length} token{'s' * (length != 1)}; give at least two.")


def longest(skeleton: Any) -> int | None:
    """Return how many tokens a model takes, where its config or a table of positions says."""
    config = skeleton.config.get_text_config()
    said = [getattr(config, name, None) for name in LIMITS]
    found = [value for value in said if isinstance(value, int) and value > 0]
    for name, module in skeleton.named_modules():
        if "position" in name and isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            found.append(module.num_embeddings - module.padding_idx - 1)
    return min(found, default=None)
