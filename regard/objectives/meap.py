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
    protect: Tensor | list[int] | None = None,
    scheme: Scheme = "independent",
    step: int = 0,
    rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Hide a share of the tokens of each row.

    Args:
        ids: inputs, int64 [B, T]; not changed.
        mask_id: the token that stands for a hidden one.
        ratio: P, in [0, 1); 0 hides nothing. Beyond 0.2 the authors tried none.
        generator: of `independent`, on the device of `ids`; default torch's own.
        valid: bool [B, T], False at padding, which is never hidden and not counted in T.
        protect: what is never hidden: a mask, bool [B, T], or token ids.
        scheme: `independent` draws for each row; `shared51` hides the same positions in all rows, the same
            again after 51 steps.
        step: of `shared51`, the number of the optimizer's step.
        rows: rows of the embedding; where given, `mask_id` is held against it.

    Returns:
        The ids with some hidden, and where, bool [B, T].

    Raises:
        RegardError: for a ratio out of range, fewer than two tokens, a `mask_id` without a row of the
            embedding, ids that hold it already, and `shared51` with padding or protected tokens, which the
            official draw does not know.
        ShapeMismatch: for masks of another shape.

    Example:
        >>> ids = torch.arange(20)[None]
        >>> hidden, where = mask_inputs(ids, 99, generator=torch.Generator().manual_seed(0))
        >>> int(where.sum()), bool((hidden[where] == 99).all()), bool(where[0, -1])
        (3, True, False)
    """
    _check(ids, mask_id, ratio, scheme, rows)
    if ratio == 0:
        return ids, torch.zeros_like(ids, dtype=torch.bool)
    if scheme == "shared51":
        if valid is not None or protect is not None:
            raise RegardError("shared51 knows no padding and no protected tokens; take scheme='independent'.")
        where = torch.zeros_like(ids, dtype=torch.bool)
        where[:, shared_positions(ids.shape[1], ratio, step)] = True
    else:
        where = _independent(ids, ratio, generator, valid, protect)
    return ids.masked_fill(where, mask_id), where


def shared_positions(length: int, ratio: float, step: int) -> list[int]:
    """Return the positions that the official code hides at a step, the same after every 51.

    Example:
        >>> shared_positions(40, 0.1, 3) == shared_positions(40, 0.1, 54)
        True
    """
    return random.Random(FIRST_SEED + step % CYCLE).sample(range(length - 1), max(1, int(length * ratio)))


def add_mask_token(model: Any, tokenizer: Any, token: str | None = None) -> int:
    """Return the id that stands for a hidden token, and make room for it where it is new.

    The new row of the embedding is the mean of the others, and so is that of the unembedding.

    Args:
        model, tokenizer: of transformers; both are changed where the token is new.
        token: one that the tokenizer has, for a vocabulary that must not grow; default `[MASK]`, which is
            added.

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
    mask_id = int(tokenizer.convert_tokens_to_ids(MASK_TOKEN))
    rows = model.get_input_embeddings().weight.shape[0]
    if mask_id >= rows:
        model.resize_token_embeddings(mask_id + 1, mean_resizing=False)
        with torch.no_grad():
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                if layer is not None:
                    layer.weight[rows:] = layer.weight[:rows].mean(0)
    return mask_id


def _independent(
    ids: Tensor, ratio: float, generator: torch.Generator | None, valid: Tensor | None,
    protect: Tensor | list[int] | None,
) -> Tensor:  # fmt: skip
    free = torch.ones_like(ids, dtype=torch.bool) if valid is None else _shaped("valid", valid, ids)
    count = (free.sum(1) * ratio).int().clamp(min=1)
    last = free.int().cumsum(1).argmax(1)
    free = free.scatter(1, last[:, None], False)
    if isinstance(protect, Tensor) and protect.dtype == torch.bool:
        free = free & ~_shaped("protect", protect, ids)
    elif protect is not None:
        free = free & ~torch.isin(ids, torch.as_tensor(protect, device=ids.device))
    drawn = torch.rand(ids.shape, generator=generator, device=ids.device).masked_fill(~free, 2.0)
    rank = drawn.argsort(1).argsort(1)
    return (rank < count[:, None]) & free


def _shaped(name: str, mask: Tensor, ids: Tensor) -> Tensor:
    if mask.shape != ids.shape:
        raise ShapeMismatch(
            f"{name} is {list(mask.shape)} and the ids {list(ids.shape)}; they must be alike."
        )
    return mask.bool()


def _check(ids: Tensor, mask_id: int, ratio: float, scheme: str, rows: int | None) -> None:
    if ids.ndim != 2 or ids.shape[1] < 2:
        raise RegardError(f"ids are {list(ids.shape)}; they must be [batch, time] with two tokens at least.")
    if not 0 <= ratio < 1:
        raise RegardError(f"ratio is {ratio}; it must be from 0 up to, and not including, 1.")
    if scheme not in get_args(Scheme):
        raise RegardError(f"scheme is {scheme!r}; it must be one of {', '.join(get_args(Scheme))}.")
    if rows is not None and not 0 <= mask_id < rows:
        raise RegardError(f"mask_id is {mask_id}, and the embedding has {rows} rows; resize it before.")
    if bool((ids == mask_id).any()):
        raise RegardError(f"the ids hold {mask_id}, which is to stand for hidden tokens; take another token.")
