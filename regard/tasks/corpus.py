"""Token ids of English text, to train tiny language models on: packaged novels, or any text.

Packaged are Pride and Prejudice (Jane Austen, 1813) and The Adventures of Sherlock Holmes (Arthur Conan
Doyle, 1892), one paragraph a line, 1.2 MB; both are in the public domain. The last tenth of each is held out.
The vocabulary is a byte-level BPE learned from the training part, so any text can be written in it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.errors import RegardError

if TYPE_CHECKING:
    from torch import Tensor

NOVELS = ("pride-and-prejudice", "sherlock-holmes")
BYTES = 256
LARGEST = 32768


@dataclass(frozen=True, eq=False)
class Corpus:
    """Text as token ids, a part to train on and a part held out.

    Attributes:
        train, held_out: int64 [N], on the CPU.
        vocabulary: number of tokens.
        bytes_per_token: of the held-out part; loss / log 2 / this is in bits a byte, which can be compared
            between vocabularies.
        tokenizer: a `tokenizers.Tokenizer`, or None where the ids came from elsewhere.
    """

    train: Tensor
    held_out: Tensor
    vocabulary: int
    bytes_per_token: float = math.nan
    tokenizer: Any = None

    def digest(self) -> str:
        """Return a hash of the token ids, the same for the same data."""
        found = hashlib.sha256()
        for part in (self.train, self.held_out):
            found.update(part.numpy().astype("<i8").tobytes() + b"\0")
        return found.hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return list(self.tokenizer.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return str(self.tokenizer.decode(list(ids)))


def novels() -> dict[str, str]:
    """Return the packaged novels, title -> text.

    Example:
        >>> novels()["pride-and-prejudice"].splitlines()[1][:34]
        'It is a truth universally acknowle'
    """
    folder = resources.files("regard") / "data"
    return {name: (folder / f"{name}.txt").read_text("utf-8") for name in NOVELS}


@lru_cache(maxsize=4)
def packaged(vocabulary: int = 512) -> Corpus:
    """Return the packaged novels as token ids.

    Args:
        vocabulary: number of tokens, from 256, which are the bytes.

    Example:
        >>> data = packaged(256)
        >>> data.decode(data.train[:19].tolist())
        'Chapter 1\\nIt is a t'
    """
    return corpus(list(novels().values()), vocabulary)


def corpus(texts: Sequence[str], vocabulary: int = 512, held_out: float = 0.1) -> Corpus:
    """Return texts as token ids, in a vocabulary learned from them.

    Args:
        texts: each gives its end to the held-out part.
        vocabulary: number of tokens, from 256, which are the bytes; fewer merges are learned from a text
            that has no more.
        held_out: share of each text, above 0 and below 1.

    Raises:
        RegardError: where an argument will not do, or there is no text.

    Example:
        >>> corpus(["to be or not to be, " * 20], 256).vocabulary
        256
    """
    import torch

    if isinstance(vocabulary, bool) or not isinstance(vocabulary, int) or not BYTES <= vocabulary <= LARGEST:
        raise RegardError(f"vocabulary is {vocabulary!r}; it must be a number from {BYTES} to {LARGEST}.")
    if not 0 < held_out < 1:
        raise RegardError(f"held_out is {held_out}; it must be above 0 and below 1.")
    if isinstance(texts, str) or not any(text.strip() for text in texts):
        raise RegardError("corpus takes a list of texts that are not empty.")
    cuts = [round(len(text) * (1 - held_out)) for text in texts]
    first = [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
    last = [text[cut:] for text, cut in zip(texts, cuts, strict=True)]
    tokenizer = _learned(first, vocabulary)
    train, rest = (
        torch.tensor([i for found in tokenizer.encode_batch(part) for i in found.ids], dtype=torch.int64)
        for part in (first, last)
    )
    size = sum(len(text.encode()) for text in last)
    return Corpus(train, rest, tokenizer.get_vocab_size(), size / max(1, len(rest)), tokenizer)


def read_corpus(path: str | Path, vocabulary: int = 512) -> Corpus:
    """Return a text file as token ids.

    Raises:
        RegardError: where it cannot be read, is not UTF-8, or is empty.
    """
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise RegardError(f"{path} cannot be read as a text: {reason}.") from None
    if not text.strip():
        raise RegardError(f"{path} holds no text.")
    return corpus([text], vocabulary)


def _learned(texts: Sequence[str], vocabulary: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    lines = [line for text in texts for line in text.splitlines(keepends=True)]
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer
