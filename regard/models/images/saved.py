"""An image model in a folder: `config.json` and `model.safetensors`, as transformers writes them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel
from transformers.utils import logging

from regard.errors import RegardError, first_sentence
from regard.models.images.registry import image_models
from regard.runtime.table import write_bytes


def save_image_model(model: PreTrainedModel, folder: str | Path) -> None:
    """Write a model into a folder that exists; each file is put in place whole.

    Raises:
        RegardError: where the folder cannot be written to.
    """
    folder = Path(folder)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving.") as scratch, _without_bars():
            model.save_pretrained(scratch)
            for file in sorted(Path(scratch).iterdir()):
                write_bytes(folder / file.name, file.read_bytes())
    except OSError as error:
        raise RegardError(f"{folder} cannot be written to: {error.strerror or error}.") from None


def load_image_model(folder: str | Path) -> Any:
    """Return the image model of a folder, in evaluation mode.

    Raises:
        RegardError: where there is none, or a file is damaged.

    Example:
        >>> model = load_image_model("regard-train/nat-nano-digits")        # doctest: +SKIP
    """
    image_models()
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise RegardError(f"there is no config.json in {folder}; a saved model has one.")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with _without_bars():
            found = AutoModelForImageClassification.from_pretrained(
                folder, config=config, local_files_only=True
            )
        return found.eval()
    except Exception as error:  # what a damaged file raises differs by what is damaged
        raise RegardError(
            f"{folder} holds no image model that can be loaded: {first_sentence(error)}."
        ) from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without the progress bars of transformers, which a file of one second does not need."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
