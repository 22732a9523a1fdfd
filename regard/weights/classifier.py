"""Classifiers of texts: with fresh weights, on top of a pretrained encoder, and into a folder.

A folder that was written is opened again by `regard.load`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regard.errors import RegardError, UnsupportedModel
from regard.weights.quiet import busy, quiet
from regard.weights.source import Loaded, Source

FRESH = {
    "bilstm": "a BiLSTM with tanh attention, of 128 a direction, on embeddings of 128",
    "bilstm-dot": "the same with scaled dot attention",
    "distilbert-tiny": "a DistilBERT of two layers of 64",
}
WORDS = 20_000


def new_classifier(name: str, texts: Sequence[str], classes: Sequence[str], longest: int = 256) -> Loaded:
    """Return a model that is to be trained, and its tokenizer.

    Args:
        name: of `FRESH`, or a folder or a name on the Hub: an encoder of transformers, which gets a new head.
        texts: what the vocabulary of a fresh model is made of.
        classes: names.
        longest: tokens of a text that it must take.

    Raises:
        RegardError: where there is no such model, or it takes fewer tokens.
        UnsupportedModel: where it cannot classify texts, or has no tokenizer or padding.
    """
    found = _fresh(name, texts, classes, longest) if name in FRESH else _pretrained(name, classes, longest)
    found.model.config.id2label = dict(enumerate(classes))
    found.model.config.label2id = {word: number for number, word in enumerate(classes)}
    return found


def save_classifier(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Write a classifier and its tokenizer into a folder that exists; each file is put in place whole.

    Raises:
        RegardError: where the folder cannot be written to.
    """
    from regard.runtime.table import write_bytes

    folder = Path(folder)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving.") as scratch, quiet():
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            for file in sorted(Path(scratch).iterdir()):
                write_bytes(folder / file.name, file.read_bytes())
    except OSError as error:
        raise RegardError(f"{folder} cannot be written to: {error.strerror or error}.") from None


def check_classifier(model: Any, name: str) -> None:
    """Refuse a model that gives no classes of texts.

    Raises:
        UnsupportedModel: naming its class.
    """
    if not type(model).__name__.endswith(("ForSequenceClassification", "AttendingModel")):
        raise UnsupportedModel(f"{name} is a {type(model).__name__}, which does not classify texts.")


def _fresh(name: str, texts: Sequence[str], classes: Sequence[str], longest: int) -> Loaded:
    from regard.models.attending_pretrained import AttendingConfig, AttendingModel
    from regard.models.tiny_distilbert import tiny_distilbert
    from regard.tasks.labelled import text_tokenizer, word_tokenizer

    if name == "distilbert-tiny":
        tokenizer = word_tokenizer(texts, WORDS)
        return Loaded(tiny_distilbert(len(tokenizer), len(classes), longest=longest), tokenizer)
    tokenizer = text_tokenizer(texts, WORDS)
    config = AttendingConfig(
        len(tokenizer), dim=128, hidden_size=256, scoring="dot" if name.endswith("dot") else "tanh",
        num_labels=len(classes),
    )  # fmt: skip
    return Loaded(AttendingModel(config), tokenizer)


def _pretrained(name: str, classes: Sequence[str], longest: int) -> Loaded:
    from transformers import AutoModelForSequenceClassification

    found = Source.find(name)
    if found.gguf:
        raise UnsupportedModel(f"{name} is a .gguf file; give an encoder of safetensors, or {_names()}.")
    tokenizer = found.tokenizer
    if tokenizer is None or tokenizer.pad_token_id is None:
        raise UnsupportedModel(f"{name} has no tokenizer with padding, which batches of texts need.")
    most = getattr(found.config, "max_position_embeddings", None)
    if isinstance(most, int) and most < longest:
        raise RegardError(
            f"{name} takes at most {most} tokens at once, and longest is {longest} (--longest)."
        )
    try:
        with busy(f"Loading {name}"), quiet():
            model = AutoModelForSequenceClassification.from_pretrained(
                found.place, num_labels=len(classes), use_safetensors=True, trust_remote_code=False,
                ignore_mismatched_sizes=True,
            )  # fmt: skip
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UnsupportedModel(f"{name} cannot be made a classifier of texts: {reason}") from None
    return Loaded(model, tokenizer)


def _names() -> str:
    return " or ".join(FRESH)
