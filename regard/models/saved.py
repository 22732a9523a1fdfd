"""A decoder in a folder: `config.json`, `model.safetensors`, and the tokenizer where there is one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from regard.attention.positions import Rotary
from regard.attention.registry import Spec
from regard.errors import RegardError
from regard.models.decoder import Decoder
from regard.runtime.table import write_bytes, write_text

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"


class Saved(NamedTuple):
    """A decoder, in evaluation mode, and its tokenizer, or None."""

    model: Decoder
    tokenizer: Any


def save_decoder(model: Decoder, folder: str | Path, tokenizer: Any = None) -> None:
    """Write a decoder into a folder that exists.

    Raises:
        RegardError: where it was made with what a file cannot hold, or the folder cannot be written to.
    """
    from safetensors.torch import save

    folder = Path(folder)
    write_text(folder / CONFIG, json.dumps(config_of(model), indent=1) + "\n")
    if tokenizer is not None:
        write_text(folder / TOKENIZER, tokenizer.to_str())
    weights = {name: x.detach().cpu().contiguous().clone() for name, x in model.state_dict().items()}
    write_bytes(folder / WEIGHTS, save(weights))


def load_decoder(folder: str | Path) -> Saved:
    """Return the decoder in a folder, and its tokenizer.

    Raises:
        RegardError: where a file is missing or damaged.

    Example:
        >>> model, tokenizer = load_decoder("regard-train/linear")        # doctest: +SKIP
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        options = json.loads((folder / CONFIG).read_text("utf-8"))
        model = Decoder(options.pop("vocabulary"), **options)
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, KeyError, TypeError, RuntimeError, json.JSONDecodeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise RegardError(f"{folder} holds no decoder that can be loaded: {reason}.") from None
    path = folder / TOKENIZER
    if not path.is_file():
        return Saved(model.eval(), None)
    from tokenizers import Tokenizer

    return Saved(model.eval(), Tokenizer.from_file(str(path)))


def config_of(model: Decoder) -> dict[str, Any]:
    """Return what a decoder was made with, as JSON holds it.

    Raises:
        RegardError: where that is a built mechanism or positions of its own.

    Example:
        >>> config_of(Decoder(256, dim=16, layers=1, mechanism="linear"))["mechanism"]
        'linear'
    """
    if isinstance(model.options["positions"], Rotary):
        raise RegardError("a config cannot hold positions of your own; give positions by name.")
    return {**model.options, "mechanism": _plain(model.options["mechanism"])}


def _plain(given: Any) -> Any:
    if isinstance(given, nn.Module):
        raise RegardError(f"a config cannot hold the built {type(given).__name__}; give its spec or name.")
    if isinstance(given, Spec):
        return given.to_dict()
    return (
        [_plain(one) for one in given]
        if isinstance(given, Sequence) and not isinstance(given, str)
        else given
    )
