"""Mask-enhanced next-token prediction (MEAP): a share of the input tokens is hidden, the targets stay clean.

    u = x[:, :T];  u[:, S] = [MASK]        S: max(1, int(P T)) distinct positions of 0 .. T - 2, at random
    loss = mean over all t of  -log p(x_t+1 | u_<=t)          hidden or not; the causal mask stays

P is 0.15 in pre-training. The last input position is never hidden. At inference nothing changes.

The official code draws one S for all rows of a batch, from one of 51 seeds that take turns with the steps
(`shared51`); here every row has its own by default.

Source: Zhuang et al., 2025, arXiv 2502.07490, section 3. Status: `shared51` agrees with the official code;
`independent` is the method as written.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from regard.errors import RegardError, ShapeMismatch

Scheme = Literal["independent", "shared51"]
RATIO = 0.15
CYCLE, FIRST_SEED = 51, 50
MASK_TOKEN = "[MASK]"


def mask_inputs(
    ids: Tensor,
    mask_id: int,
    ratio: float = RATIO,
    *,
    generator: torch.Generator | None = None,
    valid: Tensor | None = None,
    protect: Tensor | Sequence[int] | None = None,
    documents: Tensor | None = None,
    scheme: Scheme = "independent",
    step: int = 0,
    rows: int | None = None,
    allow: bool = False,
) -> tuple[Tensor, Tensor]:
    """Hide a share of the tokens of each row, or of each document in it.

    Args:
        ids: inputs, int64 [B, T]; not changed.
        mask_id: the token that stands for a hidden one.
        ratio: P, in [0, 1); 0 hides nothing. Beyond 0.2 the authors tried none.
        generator: of `independent`, on any device: the same on the CPU hides the same on a GPU; default
            torch's own on the device of `ids`.
        valid: bool [B, T], False at padding, which is never hidden and not counted in T.
        protect: what is never hidden: a mask, bool [B, T], or token ids.
        documents: which document of a packed row each token is of, int64 [B, T] from 0; each is counted for
            itself, and its last token is never hidden.
        scheme: `independent` draws for each row; `shared51` hides the same positions in all rows, the same
            again after 51 steps.
        step: of `shared51`, the number of the optimizer's step.
        rows: rows of the embedding; where given, `mask_id` is held against it.
        allow: take ids that hold `mask_id` already, such as one that ends texts.

    Returns:
        The ids with some hidden, and where, bool [B, T].

    Raises:
        RegardError: for a ratio out of range, fewer than two tokens, a `mask_id` without a row of the
            embedding, ids that hold it already, and `shared51` with padding, documents or protected tokens,
            which the official draw does not know.
        ShapeMismatch: for masks of another shape.

    Example:
        >>> ids = torch.arange(20)[None]
        >>> hidden, where = mask_inputs(ids, 99, generator=torch.Generator().manual_seed(0))
        >>> int(where.sum()), bool((hidden[where] == 99).all()), bool(where[0, -1])
        (3, True, False)
    """
    _check(ids, mask_id, ratio, scheme, rows, allow)
    if ratio == 0:
        return ids, torch.zeros_like(ids, dtype=torch.bool)
    if scheme == "shared51":
        if any(given is not None for given in (valid, protect, documents)):
            raise RegardError(
                "shared51 knows no padding, no documents and no protected tokens; take scheme='independent'."
            )
        where = torch.zeros_like(ids, dtype=torch.bool)
        where[:, shared_positions(ids.shape[1], ratio, step)] = True
    else:
        free = torch.ones_like(ids, dtype=torch.bool)
        if valid is not None:
            free = _shaped("valid", valid, ids).bool()
        choose = _of_rows
        if documents is not None:
            choose = partial(_of_documents, _shaped("documents", documents, ids))
        where = choose(_drawn(ids, generator), free, _kept(ids, protect), ratio)
    return ids.masked_fill(where, mask_id), where


def shared_positions(length: int, ratio: float, step: int) -> list[int]:
    """Return the positions that the official code hides at a step, the same after every 51.

    Example:
        >>> shared_positions(40, 0.1, 3) == shared_positions(40, 0.1, 54)
        True
    """
    return random.Random(FIRST_SEED + step % CYCLE).sample(range(length - 1), max(1, int(length * ratio)))


def check_ratio(ratio: float, name: str = "ratio") -> None:
    """Refuse a share that is not from 0 up to, and not including, 1."""
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
        raise RegardError(f"{name} is {ratio!r}; it must be from 0 up to, and not including, 1.")


def find_mask_token(tokenizer: Any, token: str | None = None) -> int:
    """Return the id that stands for a hidden token; `[MASK]` is added to a tokenizer without one.

    Args:
        tokenizer: of transformers.
        token: one that it has, for a vocabulary that must not grow, such as an unused one; default `[MASK]`.

    Raises:
        RegardError: for a named token that the tokenizer does not have.
    """
    known = tokenizer.get_vocab()
    if token is not None:
        if token not in known:
            raise RegardError(f"the tokenizer has no token {token!r}; leave it out to add {MASK_TOKEN}.")
        return int(known[token])
    if MASK_TOKEN not in known:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [MASK_TOKEN]}, replace_extra_special_tokens=False
        )
    return int(tokenizer.convert_tokens_to_ids(MASK_TOKEN))


def add_mask_token(model: Any, tokenizer: Any, token: str | None = None) -> int:
    """Return the id that stands for a hidden token, and make room for it where it is new.

    Its row of the embedding becomes the mean of those before it, also where there was one to spare, and so
    does that of the unembedding. A token that the tokenizer has already keeps its row.

    Args:
        model, tokenizer: of transformers; both are changed where the token is new.
        token: one that the tokenizer has, for a vocabulary that must not grow; default `[MASK]`, which is
            added.

    Raises:
        RegardError: for a named token that the tokenizer does not have.
    """
    fresh = token is None and MASK_TOKEN not in tokenizer.get_vocab()
    mask_id = find_mask_token(tokenizer, token)
    rows = model.get_input_embeddings().weight.shape[0]
    if mask_id >= rows:
        model.resize_token_embeddings(mask_id + 1, mean_resizing=False)
    if fresh or mask_id >= rows:
        with torch.no_grad():
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                if layer is not None:
                    layer.weight[mask_id] = layer.weight[: min(mask_id, rows)].mean(0)
    return mask_id


def with_mask_token(tokenizer: Any) -> tuple[int, Any]:
    """Return the id of `[MASK]` and a copy of a `tokenizers.Tokenizer` that has it; of a `Corpus`, say.

    A text that holds the word `[MASK]` itself was tokenized without it, and stays as it was.
    """
    copy = type(tokenizer).from_str(tokenizer.to_str())
    copy.add_special_tokens([MASK_TOKEN])
    return int(copy.token_to_id(MASK_TOKEN)), copy


def _drawn(ids: Tensor, generator: torch.Generator | None) -> Tensor:
    device = ids.device if generator is None else generator.device
    return torch.rand(ids.shape, generator=generator, device=device).to(ids.device)


def _kept(ids: Tensor, protect: Tensor | Sequence[int] | None) -> Tensor | None:
    """Which tokens are protected, bool [B, T]."""
    if protect is None:
        return None
    if isinstance(protect, Tensor) and protect.dtype == torch.bool:
        return _shaped("protect", protect, ids)
    return torch.isin(ids, torch.as_tensor(protect, device=ids.device))


def _of_rows(drawn: Tensor, free: Tensor, kept: Tensor | None, ratio: float) -> Tensor:
    """Choose among the free tokens of each row, the last left out."""
    count = (free.sum(1).double() * ratio).int().clamp(min=1)
    last = free.int().cumsum(1).argmax(1)
    free = free.scatter(1, last[:, None], False)
    free = free if kept is None else free & ~kept
    order = drawn.masked_fill(~free, 2.0).argsort(1)
    first = torch.arange(drawn.shape[1], device=drawn.device) < count[:, None]
    return torch.zeros_like(free).scatter(1, order, first) & free


def _of_documents(
    documents: Tensor, drawn: Tensor, free: Tensor, kept: Tensor | None, ratio: float
) -> Tensor:
    """Choose among the free tokens of each document, the last left out."""
    rows = torch.arange(len(free), device=free.device)[:, None] * (int(documents.max()) + 1)
    group, open_ = (documents + rows).flatten(), free.flatten()
    places = torch.arange(len(group), device=free.device)
    sizes = torch.zeros(int(group.max()) + 1, dtype=torch.long, device=free.device)
    last = torch.full_like(sizes, -1).scatter_reduce(0, group[open_], places[open_], "amax")
    sizes = sizes.scatter_add(0, group[open_], torch.ones_like(group[open_]))
    count = (sizes.double() * ratio).long().clamp(min=1)
    open_ = open_ & (places != last[group])
    open_ = open_ if kept is None else open_ & ~kept.flatten()
    order = drawn.flatten().masked_fill(~open_, 2.0).argsort()
    order = order[group[order].argsort(stable=True)]
    begins = torch.bincount(group, minlength=len(sizes)).cumsum(0).roll(1)
    begins[0] = 0
    rank = torch.empty_like(places).scatter(0, order, places - begins[group[order]])
    return ((rank < count[group]) & open_).view_as(free)


def _shaped(name: str, mask: Tensor, ids: Tensor) -> Tensor:
    if mask.shape != ids.shape:
        raise ShapeMismatch(
            f"{name} is {list(mask.shape)} and the ids {list(ids.shape)}; they must be alike."
        )
    return mask


def _check(ids: Tensor, mask_id: int, ratio: float, scheme: str, rows: int | None, allow: bool) -> None:
    if ids.ndim != 2 or ids.shape[1] < 2:
        raise RegardError(f"ids are {list(ids.shape)}; they must be [batch, time] with two tokens at least.")
    check_ratio(ratio)
    if scheme not in get_args(Scheme):
        raise RegardError(f"scheme is {scheme!r}; it must be one of {', '.join(get_args(Scheme))}.")
    if rows is not None and not 0 <= mask_id < rows:
        raise RegardError(f"mask_id is {mask_id}, and the embedding has {rows} rows; resize it before.")
    if not allow and bool((ids == mask_id).any()):
        raise RegardError(f"the ids hold {mask_id}, which is to stand for hidden tokens; take another token.")
