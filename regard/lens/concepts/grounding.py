"""What concepts stand for: the words that they make likely, and the samples in which they are most active.

    logits = unembedding(final norm(u))            final norm first where the layer is before it
    T(u)   = the first words of the likeliest tokens: longer than a letter, no stop words
    overlap(T, T') = |T and T'| / |T|              in the paper times 100

Of a shift the words are those whose logits it raises most, from the concept to the shifted one.

Source: Khayatan et al., 2025, arXiv 2501.03012, section 3; stop words are scikit-learn's. Status: partly our
choice: the official code keeps words of an English list that NLTK fetches, and reads a shift by itself, as
`unembedding(Delta)`, which is the same where states are taken after the final norm.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regard.errors import RegardError, ShapeMismatch
from regard.lens.concepts.dictionary import Concepts, sklearn
from regard.lens.concepts.features import FINAL_NORM, Layer
from regard.lens.concepts.moved import Shift
from regard.runtime.anatomy import anatomy_of, root_of
from regard.runtime.table import Table

WORDS, LIKELIEST, OF_SHIFT, NEAREST = 15, 200, 30, 50
SPACES = ("Ġ", "▁")


@torch.no_grad()
def words_of(
    model: nn.Module,
    tokenizer: Any,
    vectors: Tensor,
    *,
    layer: Layer | None = None,
    count: int = WORDS,
    most: int = LIKELIEST,
    vocabulary: Collection[str] | None = None,
) -> list[list[str]]:
    """Return the words that each vector makes likely, the likeliest first.

    Args:
        model: a causal language model.
        tokenizer: of the model.
        vectors: [K, D], places in the residual stream, such as concepts.
        layer: where; `final_norm` for states after the final norm, anything else before it.
        count: words of each at most; fewer where so many are not among the likeliest tokens.
        most: tokens that are looked through.
        vocabulary: words that count, lower case; default all tokens of letters that begin a word, but stop
            words.

    Raises:
        ShapeMismatch: for vectors of another width than the model's.
    """
    scores = _logits(model, vectors, layer)
    return _words(scores, tokenizer, count, most, vocabulary)


@torch.no_grad()
def shift_words(
    model: nn.Module,
    tokenizer: Any,
    shift: Shift,
    *,
    count: int = WORDS,
    vocabulary: Collection[str] | None = None,
) -> list[list[str]]:
    """Return the words that each concept's shift makes likelier, the most so first."""
    layer = shift.concepts.layer
    rise = _logits(model, shift.shifted, layer) - _logits(model, shift.concepts.vectors, layer)
    return _words(rise, tokenizer, count, LIKELIEST, vocabulary)


def recovered_words(
    model: nn.Module,
    tokenizer: Any,
    shift: Shift,
    *,
    count: int = WORDS,
    vocabulary: Collection[str] | None = None,
) -> Table:
    """Return words of every concept before, as shifted and after fine-tuning, and how many they share.

    Args:
        model: whose unembedding reads all of them.

    Returns:
        `concept`, `before`, `after`, `shift` (words that it raises); `unshifted`, `shifted`, the overlap of
        the words before, and of the shifted ones, with those after.
    """
    told: dict[str, Any] = {"layer": shift.concepts.layer, "count": count, "vocabulary": vocabulary}
    before = words_of(model, tokenizer, shift.concepts.vectors, **told)
    moved = words_of(model, tokenizer, shift.shifted, **told)
    after = words_of(model, tokenizer, shift.tuned.vectors[shift.partner], **told)
    raised = shift_words(model, tokenizer, shift, count=count, vocabulary=vocabulary)
    return Table({
        "concept": list(range(len(before))),
        "before": [" ".join(words) for words in before], "after": [" ".join(words) for words in after],
        "shift": [" ".join(words) for words in raised],
        "unshifted": [overlap(x, y) for x, y in zip(before, after, strict=True)],
        "shifted": [overlap(x, y) for x, y in zip(moved, after, strict=True)],
    })  # fmt: skip


def nearest_samples(concepts: Concepts, states: Tensor, count: int = NEAREST) -> Tensor:
    """Return the rows of states [n, D] in which each concept is most active, int64 [K, count].

    Raises:
        RegardError: for more than there are.
    """
    if not 1 <= count <= len(states):
        raise RegardError(f"count is {count}; there are {len(states)} samples.")
    return concepts.activate(states).T.argsort(dim=1, descending=True)[:, :count]


def overlap(first: Sequence[Any], second: Sequence[Any]) -> float:
    """Return the share of `first` that is in `second` too; NaN where there is nothing in it.

    Example:
        >>> overlap(["red", "blue"], ["blue", "green"])
        0.5
    """
    mine = set(first)
    return len(mine & set(second)) / len(mine) if mine else float("nan")


def _logits(model: nn.Module, vectors: Tensor, layer: Layer | None) -> Tensor:
    anatomy = anatomy_of(root_of(model))
    head: Any = anatomy.unembedding
    norm = anatomy.final_norm
    if head is None:
        raise RegardError(f"{type(anatomy.root).__name__} has no unembedding, so vectors have no words.")
    width = head.weight.shape[1]
    if vectors.ndim != 2 or vectors.shape[1] != width:
        raise ShapeMismatch(f"vectors are {list(vectors.shape)}; this model takes [K, {width}].")
    x = vectors.to(head.weight.device, head.weight.dtype)
    if layer != FINAL_NORM and norm is not None:
        x = norm(x)
    return head(x).float().cpu()


def _words(
    scores: Tensor, tokenizer: Any, count: int, most: int, vocabulary: Collection[str] | None
) -> list[list[str]]:
    ids = scores.topk(min(most, scores.shape[1]), dim=1).indices.tolist()
    stop = sklearn("feature_extraction.text").ENGLISH_STOP_WORDS
    marked = any(str(token)[:1] in SPACES for token in tokenizer.convert_ids_to_tokens(ids[0]))
    found = []
    for row in ids:
        words: dict[str, None] = {}
        for token in map(str, tokenizer.convert_ids_to_tokens(row)):
            begins = token[:1] in SPACES or not marked
            word = token.lstrip("".join(SPACES)).lower()
            known = word in vocabulary if vocabulary is not None else word not in stop
            if begins and word.isascii() and word.isalpha() and len(word) > 1 and known:
                words.setdefault(word)
        found.append(list(words)[:count])
    return found
