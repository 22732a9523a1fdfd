"""Needles found, by depth: the same as greedy decoding says, in batches, and what is refused."""

from dataclasses import replace

import pytest
import torch

import regard
from regard.errors import RegardError
from regard.runtime.needle_accuracy import NeedleAccuracy, needle_accuracy
from regard.tasks.needles import Asked, needle, packaged_facts
from tests.objectives.test_meap import tiny, words


def asked(model, tokenizer, seed, right):
    """A prompt whose greedy continuation of three tokens is the answer, or is not."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 60, (5 + seed,), generator=generator)
    out = model.generate(ids[None], max_new_tokens=3, do_sample=False, eos_token_id=None)[0, len(ids) :]
    answer = out.clone()
    if not right:
        answer[seed % 3] = 2 + (int(answer[seed % 3]) + 1) % 50
    text = tokenizer.decode(answer)
    return Asked(tokenizer.decode(ids), ids, text, f"fact {seed}", None, 100 * (seed % 2), seed % 3 / 2)


def test_it_is_what_greedy_decoding_writes():
    model, tokenizer = tiny().eval(), words()
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn_like(weight)
        model.lm_head.weight[:2] = 0
        model.lm_head.weight[60:] = 0
    prompts = [asked(model, tokenizer, seed, seed not in (1, 4, 5)) for seed in range(7)]
    for size in (1, 3, 7):
        found = needle_accuracy(model, tokenizer, prompts, batch_size=size, progress=False)
        assert found.right == (True, False, True, True, False, False, True)
    assert found.mean == pytest.approx(4 / 7) and found.by_depth() == {0.0: 1.0, 0.5: 0.0, 1.0: 0.5}
    assert found.by_length() == {0: 0.75, 100: pytest.approx(1 / 3)}


def test_bad_input():
    model, tokenizer = tiny().eval(), words()
    one = Asked("w2", torch.tensor([2]), "w3", "what", None, 1, 0.0)
    with pytest.raises(RegardError, match="no prompts"):
        needle_accuracy(model, tokenizer, [])
    with pytest.raises(RegardError, match="batch_size is 0"):
        needle_accuracy(model, tokenizer, [one], batch_size=0)
    with pytest.raises(RegardError, match="'what' has no token"):
        needle_accuracy(model, tokenizer, [replace(one, answer="")])
    with pytest.raises(RegardError, match="takes 2048 tokens, and the longest prompt with its answer 3001"):
        needle_accuracy(model, tokenizer, [replace(one, ids=torch.full((3000,), 2))])
    assert NeedleAccuracy((True,), (0.5,), (9,)).by_depth() == {0.5: 1.0}


@pytest.mark.real
def test_smollm2_finds_what_is_hidden():
    model, tokenizer = regard.load()
    prompts = needle(tokenizer, lengths=(80,), depths=(0.5,), facts=packaged_facts()[:3])
    found = needle_accuracy(model, tokenizer, prompts, progress=False)
    assert found.mean >= 0.5
    others = [replace(one, answer=prompts[(n + 1) % 3].answer) for n, one in enumerate(prompts)]
    assert needle_accuracy(model, tokenizer, others, progress=False).mean == 0
