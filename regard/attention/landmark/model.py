"""Landmarks for a pretrained model: the new token, attention in training and over a memory, and generation.

    marks = add_landmark_token(model, tokenizer, block=64)     a row of the embedding, the mean of the others
    with marks.training(model): ...                            grouped softmax over the whole text
    with marks.memory(model, top_k=5): marks.generate(...)     few blocks of a text of any length

A pretrained model knows nothing of landmarks: without fine-tuning the gates mean nothing.

Source: Mohtashami and Jaggi, 2023, arXiv 2305.16300, section 4.2, and its code for Llama. Status: partly our
choice: landmarks are not generated but put in, and never sampled, as in the code's other half.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.attention.landmark.generation import InsertLandmarks, refuse_misplaced
from regard.attention.landmark.memory_spec import LandmarkMemory
from regard.attention.landmark.spec import Landmark, check_block
from regard.attention.landmark.tokens import LandmarkText, insert_landmarks, remove_landmarks
from regard.attention.swap import SwapSession
from regard.errors import RegardError, ShapeMismatch

TOKEN = "<landmark>"
_GENERATING: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(frozen=True)
class Landmarks:
    """The landmark of a model: its token and how often it comes.

    Attributes:
        id: of the token.
        block: tokens in a block, the landmark included.
    """

    id: int
    block: int

    def __post_init__(self) -> None:
        check_block(self.block)

    def insert(self, ids: Tensor, **options: Any) -> LandmarkText:
        """Return ids int64 [B, T] with landmarks; options as for `insert_landmarks`, but every and id."""
        return insert_landmarks(ids, self.block - 1, self.id, **options)

    def training(self, model: nn.Module, layers: Iterable[int | str] | None = None) -> SwapSession:
        """Return a session in which a model attends by the grouped softmax over the whole text."""
        self._check_vocabulary(model)
        return SwapSession(model, Landmark(self.block), layers)

    @contextmanager
    def memory(
        self, model: nn.Module, layers: Iterable[int | str] | None = None, **options: Any
    ) -> Iterator[SwapSession]:
        """Let a model attend over a memory of blocks, and refuse ids without landmarks where they must be.

        Args:
            model: of the Llama kind, where positions are remapped.
            layers: as for `swap`.
            options: of `LandmarkMemory`, but `block`.
        """
        self._check_vocabulary(model)
        spec = LandmarkMemory(block=self.block, **options)
        hook = model.register_forward_pre_hook(self._guard, with_kwargs=True)
        try:
            with SwapSession(model, spec, layers) as session:
                yield session
        finally:
            hook.remove()

    def reader(self, model: nn.Module) -> LandmarkReader:
        """Return a model from ids without landmarks to logits, as `regard.objectives.train` takes one."""
        return LandmarkReader(self, model)

    def logits(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Return the logits at each token of ids int64 [B, T], [B, T, V]: landmarks put in, and taken out.

        The landmark's own logit is -inf.
        """
        text = self.insert(ids)
        found = model(text.ids)
        logits = remove_landmarks(getattr(found, "logits", found), text.is_landmark).clone()
        logits[..., self.id] = -torch.inf
        return logits

    @torch.no_grad()
    def generate(
        self,
        model: Any,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 20,
        **options: Any,
    ) -> Tensor:
        """Return ids with new tokens behind them, [B or more, T + max_new_tokens], without landmarks.

        Landmarks are put into the prompt and between new tokens, and are not counted. A row whose text has
        ended goes on with padding.

        Args:
            model: one with `generate`.
            ids: int64 [B, T], without landmarks.
            attention_mask: [B, T], 0 at padding on the left.
            options: of the model's `generate`.

        Raises:
            RegardError: for options that cannot be kept, such as padding on the right.
        """
        if options.get("return_dict_in_generate") or options.get("assistant_model") is not None:
            raise RegardError("landmarks.generate returns ids, and takes no assistant; leave both out.")
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise RegardError(f"max_new_tokens is {max_new_tokens!r}; it must be a whole number from 1.")
        self._check_vocabulary(model)
        if attention_mask is not None and attention_mask.numel() and not bool(attention_mask[:, -1].all()):
            raise RegardError("generation goes on at the right, so padding must be on the left.")
        config = getattr(model, "generation_config", None)
        pad = options.get("pad_token_id", getattr(config, "pad_token_id", None))
        text = self.insert(ids, mask=attention_mask, pad=pad or 0)
        every, have = self.block - 1, (text.mask & ~text.is_landmark).sum(-1)
        marks = (have + max_new_tokens - 1) // every - have // every
        inserting = InsertLandmarks(self.id, self.block, text.mask.sum(-1), text.ids.shape[1])
        processors = [*options.pop("logits_processor", []), inserting]
        _GENERATING.add(model)  # a row that has ended gets padding, and no landmarks
        try:
            out = model.generate(
                text.ids, attention_mask=text.mask.long(), max_new_tokens=max_new_tokens + int(marks.max()),
                logits_processor=processors, **options,
            )  # fmt: skip
        finally:
            _GENERATING.discard(model)
        return self._content(ids, out[:, text.ids.shape[1] :], max_new_tokens, pad or 0)

    def _content(self, ids: Tensor, new: Tensor, count: int, pad: int) -> Tensor:
        """The prompt, and the first `count` of the new tokens that are no landmarks."""
        rows = [row[row != self.id][:count] for row in new]
        longest = max((len(row) for row in rows), default=0)
        rows = [nn.functional.pad(row, (0, longest - len(row)), value=pad) for row in rows]
        prompts = ids.repeat_interleave(max(1, len(rows) // max(1, len(ids))), 0)
        return torch.cat([prompts, torch.stack(rows)], 1) if rows else prompts

    def _guard(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor) and model not in _GENERATING:
            past = kwargs.get("past_key_values")
            seen = past.get_seq_length() if past is not None else 0
            refuse_misplaced(ids, kwargs.get("attention_mask"), seen, self.id, self.block)

    def _check_vocabulary(self, model: Any) -> None:
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        rows = getattr(embedding, "num_embeddings", None)
        if rows is not None and not 0 <= self.id < rows:
            raise RegardError(
                f"the landmark is token {self.id}, and the model has {rows} tokens, 0 to {rows - 1}; "
                "add_landmark_token makes room for it."
            )


class LandmarkReader(nn.Module):
    """A language model that puts landmarks in itself, and gives logits of the other tokens alone.

    The token before a landmark predicts the one after it, and what a landmark predicts is left out: the
    paper's objective is the next-token loss of this.

    Args:
        marks: its landmarks.
        model: from ids int64 [B, T] with landmarks to logits [B, T, V], or an object with `.logits`.
    """

    def __init__(self, marks: Landmarks, model: nn.Module) -> None:
        super().__init__()
        self.marks, self.model = marks, model

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits [B, T, V] of ids int64 [B, T]."""
        return self.marks.logits(self.model, ids)


def add_landmark_token(model: Any, tokenizer: Any, *, block: int = 64, token: str = TOKEN) -> Landmarks:
    """Give a model and its tokenizer a landmark token, in place, and return it.

    Its embedding, and its row of the output layer where that is another, is the mean of all others. A
    tokenizer that has the token already keeps it.

    Args:
        model: of transformers, with embeddings that can be resized.
        tokenizer: its tokenizer.
        block: tokens in a block, the landmark included.
        token: how it is written.

    Raises:
        RegardError: where there is no model and tokenizer of transformers.

    Example:
        >>> model, tokenizer = regard.load()                                     # doctest: +SKIP
        >>> add_landmark_token(model, tokenizer, block=64)                       # doctest: +SKIP
        Landmarks(id=49152, block=64)
    """
    check_block(block)
    if not hasattr(model, "resize_token_embeddings") or not hasattr(tokenizer, "add_special_tokens"):
        raise RegardError(
            "landmarks are added to a model and tokenizer of transformers, and not to "
            f"{type(model).__name__} and {type(tokenizer).__name__}."
        )
    had = model.get_input_embeddings().num_embeddings
    known = token in tokenizer.get_vocab()
    if not known:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [token]}, replace_extra_special_tokens=False
        )
    found = int(tokenizer.convert_tokens_to_ids(token))
    if found >= had:
        model.resize_token_embeddings(found + 1, mean_resizing=False)
    if not known:
        _set_to_mean(model, found)
    if found < 0:
        raise ShapeMismatch(f"the tokenizer gives {token!r} no id.")
    return Landmarks(found, block)


@torch.no_grad()
def _set_to_mean(model: Any, row: int) -> None:
    """Set a row of the embedding, and of the output layer, to the mean of the rows before it."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    for layer in layers:
        weight = getattr(layer, "weight", None)
        if weight is not None:
            weight[row] = weight[:row].float().mean(0).to(weight.dtype)
