"""Needle tests: where the fact stands, what fills the text, and what is refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from regard.errors import RegardError
from regard.tasks.needle_controls import copying, knowing
from regard.tasks.needles import Fact, needle, packaged_facts, read_facts
from regard.tasks.passages import passages
from regard.tasks.token_spans import find_span

FACT = Fact(
    "The key of Ulm is under the green stone.", "Where is the key?", "under the green stone", "The key is"
)
TEXT = "One sentence here. Another one follows. A third is said. The fourth ends it. " * 20


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE of its own, with one token in front, as some models have."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    made.train_from_iterator([p.text for p in passages()], trainer)
    from tokenizers import decoders, processors

    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("length", [128, 200])
@pytest.mark.parametrize("stem", [True, False])
def test_the_span_is_the_answer_and_the_prompt_as_long_as_asked(tokenizer, length, stem):
    found = needle(tokenizer, lengths=(length,), depths=(0, 0.5, 1), facts=[FACT], stem=stem)
    assert len(found) == 3 and len(found.facts) == 1
    for asked in found:
        assert tokenizer.decode(asked.ids[slice(*asked.span)]).strip() == FACT.answer
        assert length - 12 <= len(asked.ids) <= length
        assert asked.prompt.endswith(FACT.stem) == stem and FACT.needle in asked.prompt
    starts = [asked.span[0] for asked in found]
    assert starts == sorted(starts) and starts[0] < 12 and starts[2] > starts[1] + 20


def test_the_needle_stands_after_a_full_stop(tokenizer):
    for depth in (0.2, 0.4, 0.6, 0.8):
        asked = needle(tokenizer, lengths=(220,), depths=(depth,), facts=[FACT], haystack=TEXT)[0]
        before = asked.prompt[: asked.prompt.index(FACT.needle)].rstrip()
        assert before.endswith(".") and abs(len(before) / asked.prompt.index("\nBased") - depth) < 0.35


def test_the_seed_draws_the_text_and_nothing_else(tokenizer):
    options = {"lengths": (160,), "depths": (0.5,), "facts": [FACT]}
    one, same, other = (needle(tokenizer, seed=seed, **options)[0] for seed in (1, 1, 2))
    assert torch.equal(one.ids, same.ids) and not torch.equal(one.ids, other.ids)


def test_halves_share_no_fact(tokenizer):
    one, two = needle(tokenizer, lengths=(160,), depths=(0.2, 0.8), facts=packaged_facts()[:5]).halves()
    assert not set(one.facts) & set(two.facts)
    assert (len(one), len(two)) == (6, 4)


def test_packaged_facts_are_two_dozen_and_their_answers_in_them():
    facts = packaged_facts()
    assert len({f.question for f in facts}) == 24 and all(f.answer in f.needle for f in facts)


def test_a_chat_template_holds_the_text(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}[assistant] "
    try:
        asked = needle(tokenizer, lengths=(200,), depths=(0.5,), facts=[FACT], chat=True)[0]
    finally:
        tokenizer.chat_template = None
    assert asked.prompt.startswith("[user] <book>") and "[assistant] The key is" in asked.prompt
    assert tokenizer.decode(asked.ids[slice(*asked.span)]).strip() == FACT.answer


def test_without_characters_the_window_of_ids_is_found(tokenizer):
    prompt = f"Some words before. {FACT.needle} And after."
    ids = tokenizer(prompt)["input_ids"]
    begin = prompt.index(FACT.answer)
    exact = find_span(tokenizer, prompt, FACT.answer, (begin, begin + len(FACT.answer)), ids)
    slow = SimpleNamespace(is_fast=False)
    slow_call = lambda text, **options: tokenizer(text, **options)  # noqa: E731
    slow = type("Slow", (), {"is_fast": False, "__call__": lambda self, *a, **k: slow_call(*a, **k)})()
    assert find_span(slow, prompt, FACT.answer, None, ids) == exact
    assert find_span(slow, prompt, "quite another thing altogether", None, ids) is None


def test_a_file_of_needles(tmp_path, tokenizer):
    path = tmp_path / "needles.jsonl"
    told = {"needle": FACT.needle, "question": FACT.question, "real_needle": FACT.answer}
    path.write_text(json.dumps(told) + "\n\n")
    (read,) = read_facts(path)
    assert (read.needle, read.answer, read.stem) == (FACT.needle, FACT.answer, "")
    path.write_text('{"needle": "x"}\n')
    with pytest.raises(RegardError, match="line 1 of .* is no JSON object with needle"):
        read_facts(path)
    with pytest.raises(RegardError, match="cannot be read"):
        read_facts(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    "options, said",
    [
        ({"lengths": (20,)}, "the needle and the question alone take"),
        ({"lengths": (400,), "haystack": "Too short."}, "give a longer text, or a smaller length"),
        ({"depths": (1.5,)}, "a depth is 1.5"),
        ({"lengths": (0,)}, "a length is 0"),
        ({"lengths": ()}, "takes a length"),
        ({"chat": True}, "no chat template"),
        ({"facts": [Fact("It is here.", "Where?", "somewhere else entirely")]}, "is not found in its prompt"),
    ],
)
def test_what_cannot_be_made_is_refused_in_a_sentence(tokenizer, options, said):
    with pytest.raises(RegardError, match=said):
        needle(tokenizer, **{"lengths": (128,), "facts": [FACT], **options})


def test_controls(tokenizer):
    lists = copying(tokenizer, 3, words=5, seed=1)
    for asked in lists:
        assert tokenizer.decode(asked.ids[slice(*asked.span)]).strip() == asked.answer
        begun = asked.prompt.rpartition(": ")[2]
        assert asked.prompt.count(begun.split(",")[0]) == 2 and len(asked.answer.split(", ")) == 3
    assert all(asked.span is None and asked.answer not in asked.prompt for asked in knowing(tokenizer))
    with pytest.raises(RegardError, match="a list takes from 3"):
        copying(tokenizer, words=2)
