"""A prompt's parts are found again after the chat template, the tokenizer and padding."""

import pytest
import torch

import regard
from regard import Prompt, encode_prompts
from regard.errors import RegardError
from regard.runtime.edits.bias import ScoreBias

PARTS = Prompt(
    system="You are terse.",
    instruction="Answer from the facts.",
    facts=["The cat is red.", "The dog is blue."],
    question="What is the dog?",
    options=["red", "blue"],
    labels="AB",
    right=1,
    begun="Answer: (",
)
SHORT = Prompt(facts="It rained.", question="Did it rain?")
WANTED = {
    "system": "You are terse.",
    "instruction": "Answer from the facts.",
    "facts.0": "The cat is red.",
    "facts.1": "The dog is blue.",
    "facts": "The cat is red.The dog is blue.",
    "question": "What is the dog?",
    "options.0": "red",
    "options.1": "blue",
    "options": "redblue",
}
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def tokenizer(smollm):
    return smollm[1]


def decoded(tokenizer, inputs, spans, row):
    """What stands in each span, pieces stripped of spaces and joined."""
    ids = inputs["input_ids"][row]
    found = {}
    for name, mask in spans.items():
        places = mask[row].nonzero()[:, 0].tolist()
        runs = [p for i, p in enumerate(places) if i == 0 or p != places[i - 1] + 1]
        stops = [p + 1 for i, p in enumerate(places) if i + 1 == len(places) or places[i + 1] != p + 1]
        found[name] = "".join(tokenizer.decode(ids[a:b]).strip() for a, b in zip(runs, stops, strict=True))
    return found


@pytest.mark.real
@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_parts_are_found_in_a_padded_batch(tokenizer, chat, side):
    inputs, spans = encode_prompts(tokenizer, [SHORT, PARTS], chat=chat, padding_side=side)
    assert decoded(tokenizer, inputs, spans, 1) == WANTED
    shown = {name: text for name, text in decoded(tokenizer, inputs, spans, 0).items() if text}
    assert shown == {"facts": "It rained.", "facts.0": "It rained.", "question": "Did it rain?"}
    padded = inputs["attention_mask"][0] == 0
    assert padded.any() and not any(mask[0, padded].any() for mask in spans.values())
    whole = tokenizer.decode(inputs["input_ids"][1][inputs["attention_mask"][1].bool()])
    assert whole.endswith("Answer: (")
    assert ("<|im_start|>system\nYou are terse.<|im_end|>" in whole) == chat


@pytest.mark.real
def test_a_template_without_a_system_turn_gets_it_in_the_users(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", NO_SYSTEM)
    inputs, spans = encode_prompts(tokenizer, [PARTS])
    assert decoded(tokenizer, inputs, spans, 0) == WANTED
    assert tokenizer.decode(inputs["input_ids"][0]).startswith(
        "<|im_start|>user\nYou are terse.\nAnswer from"
    )


@pytest.mark.real
def test_edits_take_the_spans(smollm):
    model, tokenizer = smollm
    inputs, spans = encode_prompts(tokenizer, [SHORT, PARTS])
    with torch.no_grad():
        plain = model(**inputs, logits_to_keep=1).logits
        with regard.steer(model, ScoreBias(5.0, span="options"), spans=spans):
            steered = model(**inputs, logits_to_keep=1).logits
    moved = (steered - plain).abs().amax((1, 2))
    assert moved[0] < 1e-3 < moved[1]


def test_plain_text():
    assert PARTS.text == (
        "You are terse.\nAnswer from the facts.\nThe cat is red.\nThe dog is blue.\nWhat is the dog?\n"
        "(A) red\n(B) blue\nAnswer: ("
    )
    assert PARTS.answers == ("A", "B")
    assert Prompt(question="Paris is in", options=["France", "Spain"]).text == "Paris is in"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"system": "a"}, "needs an instruction, a fact or a question"),
        ({"question": "a", "options": "xy", "labels": "A"}, "1 labels for 2 options"),
        ({"question": "a", "options": ["x", ""]}, "an option, or its label, is empty"),
        ({"question": "a", "options": "xy", "right": 2}, "option 2 is said to be right, of 2"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(RegardError, match=message):
        Prompt(**options)


@pytest.mark.real
def test_what_cannot_be_encoded(tokenizer, monkeypatch):
    with pytest.raises(RegardError, match="no prompts"):
        encode_prompts(tokenizer, [])
    monkeypatch.setattr(
        tokenizer, "chat_template", "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    )
    with pytest.raises(RegardError, match="changed the content"):
        encode_prompts(tokenizer, [PARTS])
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(RegardError, match="has no chat template"):
        encode_prompts(tokenizer, [PARTS], chat=True)
    assert encode_prompts(tokenizer, [PARTS])[0]["input_ids"].shape[0] == 1
