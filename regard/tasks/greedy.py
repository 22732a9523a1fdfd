"""What a model says to prompts: the likeliest token at every step, many prompts at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from regard.errors import RegardError


@torch.no_grad()
def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    tokens: int = 24,
    batch: int = 32,
    chat: bool = False,
    tick: Callable[[int], None] | None = None,
) -> list[str]:
    """Return the answer to each prompt, by `generate()` without sampling.

    Args:
        model: of transformers, in evaluation mode.
        tokenizer: its own; where it has no token for padding, the one that ends a text pads.
        prompts: texts; they are padded on the left.
        tokens: new ones at most.
        batch: prompts at once.
        chat: put each prompt as what the user says, through the tokenizer's chat template.
        tick: told how many prompts were done, after each batch.

    Returns:
        Texts without special tokens.

    Raises:
        RegardError: for no prompts, or a chat where the tokenizer has no template.
    """
    answers: list[str] = []
    for at in range(0, len(prompts), batch):
        part = prompts[at : at + batch]
        fed = padded_prompts(tokenizer, part, chat=chat).to(model.device)
        made = model.generate(
            **fed, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        new = made[:, fed["input_ids"].shape[1] :]
        answers += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
        if tick is not None:
            tick(len(part))
    return answers


def padded_prompts(tokenizer: Any, prompts: Sequence[str], *, chat: bool = False) -> Any:
    """Return `input_ids` and `attention_mask` of prompts, int64 [B, T], padded on the left.

    Raises:
        RegardError: for no prompts, or a chat where the tokenizer has no template.
    """
    if not prompts:
        raise RegardError("there are no prompts.")
    if chat and not getattr(tokenizer, "chat_template", None):
        raise RegardError("the tokenizer has no chat template; give the prompts as plain text.")
    texts = list(prompts)
    if chat:
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            for text in texts
        ]
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=not chat,
        return_token_type_ids=False,
    )  # fmt: skip
