"""What one seed of the study `retrieval-heads` measures."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from regard.edit import ScaleHeads
from regard.lens.retrieval_heads.answering import answer
from regard.lens.retrieval_heads.detection import detect
from regard.lens.retrieval_heads.scores import RETRIEVAL, RetrievalScores
from regard.runtime.head_statistics import rank_correlation
from regard.runtime.protocol import Edit
from regard.runtime.verbs import steer
from regard.tasks.needle_controls import copying, knowing
from regard.tasks.needles import Asked, Needles, needle, packaged_facts
from regard.tasks.passages import passages

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


def needles(tokenizer: Any, size: Any, seed: int) -> tuple[Needles, Needles]:
    """Return two sets of prompts that share no fact, each fact at a depth of its own."""
    source = random.Random(seed)
    facts = packaged_facts()
    source.shuffle(facts)
    made: list[Asked] = []
    for number, fact in enumerate(facts[: 2 * size.facts]):
        depth = source.choice(DEPTHS)
        made += needle(
            tokenizer, lengths=(size.length,), depths=(depth,), facts=[fact], seed=100 * seed + number
        )
    return Needles(tuple(made[: size.facts])), Needles(tuple(made[size.facts :]))


def measured(
    model: Any, tokenizer: Any, size: Any, seed: int, tick: Callable[[float], None]
) -> dict[str, Any]:
    """Return every quantity of one seed, and what the picture needs."""
    first, second = needles(tokenizer, size, seed)
    ranked = detect(model, tokenizer, first, progress=False)
    tick(0.2)
    other = detect(model, tokenizer, second, progress=False)
    tick(0.4)
    heads = ranked.list(size.heads)
    top = ScaleHeads(heads=heads)
    others = [ScaleHeads(heads=heads.control(1000 * seed + draw)) for draw in range(size.draws)]
    tasks = {
        "needle": second,
        "copying": copying(tokenizer, size.lists, seed=seed),
        "knowing": knowing(tokenizer)[: size.known],
    }
    found: dict[str, Any] = {}

    def recall(task: str, *edits: Edit) -> float:
        return answer(model, tokenizer, tasks[task], *edits, progress=False).mean

    for place, task in enumerate(tasks):
        found[task] = other.answered if task == "needle" else recall(task)
        found[f"{task}_top"] = recall(task, top)
        found[f"{task}_random"] = [recall(task, edit) for edit in others]
        tick((0.7, 0.8, 0.85)[place])
    uniform = ScaleHeads(heads=heads, mode="uniform", scope="decode")
    found["needle_uniform"] = recall("needle", uniform)
    found["perplexity"] = perplexity(model, tokenizer, size.passages)
    found["perplexity_top"] = perplexity(model, tokenizer, size.passages, top)
    found["perplexity_random"] = [perplexity(model, tokenizer, size.passages, edit) for edit in others]
    return {**found, **_agreement(ranked, other, seed), "heads": list(heads.ranked)}


def perplexity(model: Any, tokenizer: Any, count: int, *edits: Edit) -> float:
    """Return the perplexity of packaged passages, mean loss over all their tokens."""
    total, tokens = 0.0, 0
    with torch.no_grad(), steer(model, *edits) if edits else nullcontext():
        for passage in passages()[:count]:
            ids = tokenizer(passage.text, return_tensors="pt")["input_ids"]
            logits = model(ids).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            tokens += len(logits)
    return math.exp(total / tokens)


def _agreement(ranked: RetrievalScores, other: RetrievalScores, seed: int) -> dict[str, Any]:
    """How alike two rankings are, and the scores themselves."""
    one, two = ranked["score"], other["score"]
    shuffled = np.random.default_rng(seed).permutation(two)
    return {
        "correlation": rank_correlation(one, two),
        "correlation_shuffled": rank_correlation(one, shuffled),
        "pearson": float(np.corrcoef(one, two)[0, 1]),
        "counted": [ranked.counted, other.counted],
        "retrieval": [int((x >= RETRIEVAL).sum()) for x in (one, two)],
        "never": [int((x == 0).sum()) for x in (one, two)],
        "scores": [[round(float(v), 4) for v in x] for x in (one, two)],
        "shape": list(ranked.grid("score").shape),
        "chance": ranked.chance,
    }
