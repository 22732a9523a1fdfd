"""Simpler signs that a model knows a concept, to hold beside self-familiarity. Higher is more familiar.

    name            1/n sum log p(name | `Explain the "`)               the name alone, without any explaining
    forward         1/n sum log p(explanation | its prompt)             minus the log of its perplexity
    backward        1/n sum log p(name | masked explanation): no search, no free words, one form
    says yes        p(Yes) / (p(Yes) + p(No)) to `Do you know what "c" is?`
    agreement       mean overlap of the content words of sampled explanations, concept blotted out
    frequency       minus the rarity of its words (`regard.tasks.concepts.rarity`)
    tokens          minus the number of its tokens

The groups follow Luo, Xiao and Ma, 2023, arXiv 2309.02654: parameters (name, forward, backward), prompt (says
yes) and sampling (agreement, after Manakul et al., 2023, arXiv 2303.08896). Status: our choice in every
detail; the last two are controls.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from regard.errors import RegardError
from regard.lens.familiarity.forms import blot_out
from regard.lens.familiarity.prompts import EXPLAIN, GUESS
from regard.lens.familiarity.scoring import SelfFamiliarity
from regard.tasks.concepts import rarity
from regard.tasks.word_ranks import STOP_WORDS

KNOW = 'Do you know what "{}" is? Answer with Yes or No.'
YES, NO = ("Yes", " Yes", "yes"), ("No", " No", "no")


def name_likelihood(known: SelfFamiliarity, concepts: Sequence[str]) -> list[float]:
    """Return the mean log-probability of each name's tokens inside the prompt that asks to explain it."""
    pairs = []
    for concept in concepts:
        before = known.prompts.text(EXPLAIN.format("\0")).partition("\0")[0]
        pairs.append((known.prompts.ids(before), _ids(known, concept)))
    return mean_logprobs(known, pairs)


def explanation_likelihood(
    known: SelfFamiliarity, concepts: Sequence[str], explanations: Sequence[str]
) -> list[float]:
    """Return the mean log-probability of each explanation's tokens after its prompt."""
    prompts = [known.prompts.ids(known.prompts.text(EXPLAIN.format(concept))) for concept in concepts]
    texts = [_ids(known, text) for text in explanations]
    if not all(texts):
        raise RegardError("an empty explanation has no likelihood.")
    return mean_logprobs(known, list(zip(prompts, texts, strict=True)))


def backward_likelihood(
    known: SelfFamiliarity, concepts: Sequence[str], masked: Sequence[str]
) -> list[float]:
    """Return the mean log-probability of each name as written, straight after its masked explanation."""
    prompts = [known.prompts.ids(known.prompts.text(GUESS.format(text))) for text in masked]
    return mean_logprobs(known, list(zip(prompts, (_ids(known, c) for c in concepts), strict=True)))


@torch.no_grad()
def says_yes(known: SelfFamiliarity, concepts: Sequence[str]) -> list[float]:
    """Return how much likelier the model says that it knows each concept than that it does not."""
    sides = [[ids[0] for word in words if len(ids := _ids(known, word)) == 1] for words in (YES, NO)]
    if not all(sides):
        raise RegardError("neither Yes nor No is a token of its own here.")
    found = []
    for concept in concepts:
        prompt = torch.tensor([known.prompts.ids(known.prompts.text(KNOW.format(concept)))])
        logits = _last_logits(known, prompt, torch.ones_like(prompt), 1)
        chance = logits[0, -1].float().softmax(-1)
        yes, no = (float(chance[side].sum()) for side in sides)
        found.append(yes / (yes + no))
    return found


def agreement(
    known: SelfFamiliarity, concepts: Sequence[str], samples: int = 3, tokens: int = 24, seed: int = 0
) -> list[float]:
    """Return how alike sampled explanations of each concept are: mean Jaccard overlap of their content words.

    Args:
        samples: explanations of each concept, from 2, drawn at temperature 1 from all tokens.
        tokens: of each at most.
        seed: of torch's generator, which is put back afterwards.
    """
    if samples < 2:
        raise RegardError(f"samples is {samples}; two explanations at least can agree.")
    asked = [EXPLAIN.format(concept) for concept in concepts for _ in range(samples)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        texts = known.write(asked, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens)
    found = []
    for place, concept in enumerate(concepts):
        own = texts[place * samples : (place + 1) * samples]
        found.append(_overlap([_content(blot_out(text, concept, mark=" ")) for text in own]))
    return found


def word_frequency(concepts: Sequence[str]) -> list[float]:
    """Return minus the rarity of each concept's words, whatever the model."""
    return [-rarity(concept.lower()) for concept in concepts]


def token_count(known: SelfFamiliarity, concepts: Sequence[str]) -> list[float]:
    """Return minus the number of each concept's tokens."""
    return [-float(len(_ids(known, concept))) for concept in concepts]


@torch.no_grad()
def mean_logprobs(known: SelfFamiliarity, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    """Return the mean log-probability of each continuation's tokens after its prompt.

    Args:
        known: holds the model.
        pairs: token ids of prompt and continuation; rows of a batch are padded on the right.
    """
    found: list[float] = []
    for start in range(0, len(pairs), known.batch_size):
        some = pairs[start : start + known.batch_size]
        longest = max(len(prompt) + len(rest) for prompt, rest in some)
        rows = [(prompt + rest) + [known.pad] * (longest - len(prompt) - len(rest)) for prompt, rest in some]
        mask = [[1] * (len(p) + len(r)) + [0] * (longest - len(p) - len(r)) for p, r in some]
        first = min(len(prompt) for prompt, _ in some)
        logits = _last_logits(known, torch.tensor(rows), torch.tensor(mask), longest - first + 1)
        for row, (prompt, rest) in enumerate(some):
            at = len(prompt) - first
            told = logits[row, at : at + len(rest)].float().log_softmax(-1)
            picked = told.gather(1, torch.tensor(rest, device=told.device)[:, None])
            found.append(float(picked.mean()))
    return found


def _last_logits(known: SelfFamiliarity, ids: Tensor, mask: Tensor, count: int) -> Tensor:
    """Logits [B, count, V] of the last positions; only these, where the model can leave the others out."""
    able = "logits_to_keep" in inspect.signature(known.model.forward).parameters
    options: dict[str, Any] = {"logits_to_keep": count} if able else {}
    device = _device(known)
    out = known.model(
        input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **options
    ).logits
    return out[:, -count:]


def _ids(known: SelfFamiliarity, text: str) -> list[int]:
    return [int(token) for token in known.tokenizer(text, add_special_tokens=False)["input_ids"]]


def _device(known: SelfFamiliarity) -> torch.device:
    return next(known.model.parameters()).device


def _content(text: str) -> set[str]:
    return {word for word in re.findall(r"[^\W\d_]{3,}", text.lower()) if word not in STOP_WORDS}


def _overlap(sets: Sequence[set[str]]) -> float:
    pairs = list(combinations(sets, 2))
    return sum(len(a & b) / max(1, len(a | b)) for a, b in pairs) / len(pairs)
