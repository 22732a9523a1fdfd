"""The search for an answer that names a concept: against every continuation there is, and its promises."""

import itertools
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from regard.errors import RegardError, UnsupportedModel
from regard.lens.familiarity.automaton import SAID, START, Phrases
from regard.lens.familiarity.search import constrained_search

VOCABULARY, END = 12, 1


@pytest.fixture(scope="module")
def model():
    """Four layers, twelve tokens, logits spread far enough that continuations differ."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=END, pad_token_id=0,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    made.lm_head.weight.data *= 12
    return made


def says(tokens, phrases):
    return any(
        tuple(tokens[at : at + len(phrase)]) == tuple(phrase)
        for phrase in phrases
        for at in range(len(tokens) - len(phrase) + 1)
    )


@torch.no_grad()
def best_of_all(model, prompt, phrases, most):
    """Mean log-probability and tokens of the best continuation, by trying them all in one batch."""
    tokens = [token for token in range(VOCABULARY) if token != END]
    full = list(itertools.product(tokens, repeat=most))
    rows = torch.tensor([[*prompt, *more] for more in full])
    logprobs = model(rows).logits.log_softmax(-1)[:, len(prompt) - 1 :]
    picked = logprobs[:, :-1].gather(2, rows[:, len(prompt) :, None])[..., 0]
    found = {}
    for row, more in enumerate(full):
        for length in range(1, most + 1):
            if not says(more[:length], phrases):
                continue
            total = float(picked[row, :length].sum())
            if length == most:
                found[more] = total / most
            else:
                found[(*more[:length], END)] = (total + float(logprobs[row, length, END])) / (length + 1)
    best = max(found, key=found.get)
    return found[best], best


@pytest.mark.parametrize(
    ("phrases", "steps"), [([[3, 4], [5]], 4), ([[2, 3, 2]], 3), ([[2, 3]], 3), ([[6, 6], [7, 8, 9]], 3)]
)
def test_wide_beams_find_the_best_of_all_continuations(model, phrases, steps):
    prompt = [4, 2, 9]
    asked = Phrases(phrases)
    extra = steps - asked.longest
    found = constrained_search(model, [prompt], [asked], beams=VOCABULARY**steps, extra=extra, ends=[END])[0]
    mean, tokens = best_of_all(model, prompt, phrases, steps)
    assert found.tokens == tokens
    assert found.mean == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize("beams", [1, 2, 5])
def test_every_answer_says_a_phrase_within_its_budget(model, beams):
    prompts = [[2], [3, 5, 7, 4], [9, 9]]
    phrases = [[[10, 11]], [[2, 3, 4], [8]], [[5, 5, 6]]]
    asked = [Phrases(each) for each in phrases]
    found = constrained_search(model, prompts, asked, beams=beams, extra=3, ends=[END])
    for each, own, automaton in zip(found, phrases, asked, strict=True):
        assert says(each.tokens, own) and len(each.tokens) <= automaton.longest + 3
        assert END not in each.tokens[:-1]


def test_prompts_in_a_batch_score_as_alone_and_as_in_a_full_forward(model):
    prompts, phrases = [[2], [3, 5, 7, 4], [9, 9]], [[[10, 11]], [[2, 3, 4], [8]], [[5, 5, 6]]]
    together = constrained_search(model, prompts, [Phrases(p) for p in phrases], beams=4, extra=3, ends=[END])
    for prompt, own, found in zip(prompts, phrases, together, strict=True):
        alone = constrained_search(model, [prompt], [Phrases(own)], beams=4, extra=3, ends=[END])[0]
        assert alone.tokens == found.tokens
        ids = torch.tensor([[*prompt, *found.tokens]])
        with torch.no_grad():
            logprobs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(found.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found.logprobs), expected, rtol=1e-4, atol=1e-5)
        assert found.mean == pytest.approx(float(expected.mean()), abs=1e-5)


def test_more_beams_are_no_worse_in_the_mean(model):
    means = []
    for beams in (1, 4, 16):
        found = [
            constrained_search(model, [[a, b]], [Phrases([[10, 4]])], beams=beams, extra=2, ends=[END])[0]
            for a, b in ((2, 3), (3, 4), (4, 2), (4, 4))
        ]
        means.append(sum(each.mean for each in found) / len(found))
    assert means[0] < means[1] <= means[2] + 1e-6


def test_a_phrase_is_recognised_after_a_false_start():
    phrases = Phrases([[1, 1, 2], [3]])
    state = START
    for token in (1, 1, 1):
        state = phrases.after(state, token)
    assert phrases.left[state] == 1 and phrases.after(state, 2) == SAID
    assert phrases.after(SAID, 9) == SAID and phrases.onward(state) == {1, 2, 3}
    inner = Phrases([[1, 2, 3, 4], [2, 3]])
    assert inner.after(inner.after(inner.after(START, 1), 2), 3) == SAID


def test_what_cannot_be_searched_is_refused(model):
    with pytest.raises(RegardError, match="at least one token"):
        Phrases([[]])
    with pytest.raises(RegardError, match="beams is 0"):
        constrained_search(model, [[2]], [Phrases([[3]])], beams=0)
    with pytest.raises(RegardError, match="every prompt needs tokens"):
        constrained_search(model, [[]], [Phrases([[3]])])
    with pytest.raises(RegardError, match="ends a text"):
        constrained_search(model, [[2]], [Phrases([[END]])], beams=2, extra=1, ends=[END])


def test_a_model_without_a_cache_is_refused(model):
    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, attention_mask, past_key_values=None, use_cache=True):
            return type("Out", (), {"logits": torch.zeros(*input_ids.shape, VOCABULARY)})

    with pytest.raises(UnsupportedModel, match="no cache"):
        constrained_search(Bare(), [[2]], [Phrases([[3]])], beams=2)
    assert math.isfinite(constrained_search(model, [[2]], [Phrases([[3]])], beams=2)[0].mean)
