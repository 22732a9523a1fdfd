"""What a needle test is held against: copying without a question, and knowing without a text.

    copying    a list of words, begun a second time          -> the rest of the list
    knowing    "The capital of France is the city of"        -> Paris, which stands nowhere in the prompt

Status: our choice. "Retrieval Head Mechanistically Explains Long-Context Factuality" (Wu et al., 2024,
arXiv 2404.15574) takes extractive questions, and MMLU without chains of thought, of larger models.
"""

from __future__ import annotations

import random
from typing import Any

from regard.errors import RegardError
from regard.tasks.multiple_choice import KINDS
from regard.tasks.needles import Asked, Needles, known_stems
from regard.tasks.prompts import check_count
from regard.tasks.token_spans import find_span


def copying(tokenizer: Any, count: int = 12, *, words: int = 8, seed: int = 0) -> Needles:
    """Return lists of words that are begun a second time; the rest of the list is the answer.

    Args:
        tokenizer: of transformers.
        count: how many lists.
        words: how many words a list has, from 3.
        seed: of the words.

    Raises:
        RegardError: for fewer than three words, or more than there are.
    """
    import torch

    check_count(count)
    known = sorted({word for kind in KINDS.values() for word in kind})
    if not 3 <= words <= len(known):
        raise RegardError(f"words is {words}; a list takes from 3 to {len(known)}.")
    source, prompts = random.Random(seed), []
    for _ in range(count):
        chosen = source.sample(known, words)
        head, told = "The list: ", ", ".join(chosen)
        answer = ", ".join(chosen[2:])
        prompt = f"{head}{told}.\nThe same list again: {', '.join(chosen[:2])},"
        begin = len(head) + len(", ".join(chosen[:2])) + 2
        ids = list(tokenizer(prompt)["input_ids"])
        span = find_span(tokenizer, prompt, answer, (begin, begin + len(answer)), ids)
        prompts.append(Asked(prompt, torch.tensor(ids), answer, told, span))
    return Needles(tuple(prompts), "copying")


def knowing(tokenizer: Any) -> Needles:
    """Return the packaged sentences whose last word a model knows without being told."""
    import torch

    prompts = [
        Asked(stem, torch.tensor(list(tokenizer(stem)["input_ids"])), answer, stem)
        for stem, answer in known_stems()
    ]
    return Needles(tuple(prompts), "knowing")
