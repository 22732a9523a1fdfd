"""The gate in front of generate(): what it withholds, what it leaves as it was, and what it refuses."""

import pytest
import torch
from transformers import TextIteratorStreamer, pipeline

from regard.errors import RegardError
from regard.lens.familiarity import Familiarity, SelfFamiliarity
from tests.lens.test_familiarity import SIZES, known, model, tokenizer  # noqa: F401


class Fixed(SelfFamiliarity):
    """Knows Rome and nothing else."""

    def in_batches(self, concepts):
        yield [Familiarity(c, 0.9 if c == "Rome" else 0.01, "", "") for c in concepts]


@pytest.fixture
def fixed(model, tokenizer):  # noqa: F811
    return Fixed(model, tokenizer, **SIZES)


def batch(known, *instructions):  # noqa: F811
    texts = [known.prompts.text(text) for text in instructions]
    known.tokenizer.padding_side = "left"
    return known.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)


def test_an_answered_batch_is_generates_own(fixed, model):  # noqa: F811
    gate, inputs = fixed.guard(threshold=0.5), batch(fixed, "Where is Rome?", "Tell me of Rome, please.")
    plain = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(gate(**inputs, max_new_tokens=5, do_sample=False), plain)
    assert [d.answered for d in gate.decisions] == [True, True]
    told = gate(**inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(told.sequences, plain) and len(told.scores) == 5


def test_withheld_rows_say_why_and_the_others_are_as_they_were(fixed, model, tokenizer):  # noqa: F811
    gate = fixed.guard(model.generate, threshold=0.5)
    inputs = batch(fixed, "Where is Rome?", "Who was Zorblat?", "Who are you?")
    out = gate(**inputs, max_new_tokens=5, do_sample=False)
    alone = model.generate(**batch(fixed, "Where is Rome?"), max_new_tokens=5, do_sample=False)
    length, texts = (
        inputs["input_ids"].shape[1],
        tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True),
    )
    assert torch.equal(out[:, :length], inputs["input_ids"])
    assert texts[0] == tokenizer.decode(alone[0, -5:], skip_special_tokens=True)
    assert texts[1].startswith('I do not know "Zorblat" well enough to answer (familiarity 0.01')
    assert "cannot tell what this is about" in texts[2]
    assert [d.answered for d in gate.decisions] == [True, False, False]
    assert gate.decisions[1].reason == (
        'withheld: familiarity 0.01 is not above 0.5; least familiar is "Zorblat" (0.01)'
    )
    assert "no concept was found" in gate.decisions[2].reason
    two = gate(**inputs, max_new_tokens=3, do_sample=True, num_return_sequences=2)
    assert len(two) == 6 and torch.equal(two[2], two[3])
    told = gate(**inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(told.sequences, out) and told.scores[0].shape[0] == 1


def test_nothing_is_generated_where_all_is_withheld(fixed, tokenizer):  # noqa: F811
    def never(**options):
        raise AssertionError("nothing was to be generated")

    gate = fixed.guard(never, threshold=0.5, words=lambda decision: "No.")
    inputs = batch(fixed, "Who was Zorblat?")
    out = gate(inputs["input_ids"], max_new_tokens=5)
    text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == "No."
    assert torch.equal(gate(inputs["input_ids"], return_dict_in_generate=True).sequences, out)
    lenient = fixed.guard(lambda input_ids, **_: input_ids, threshold=0.5, unnamed="answer")
    assert lenient(batch(fixed, "Who are you?")["input_ids"]).shape[0] == 1 and lenient.decisions[0].answered


@pytest.mark.parametrize(
    ("question", "start"), [("Who was Zorblat?", "I do not know"), ("Where is Rome?", "")]
)
def test_a_streamer_gets_the_words_either_way(fixed, model, tokenizer, question, start):  # noqa: F811
    gate, inputs = fixed.guard(threshold=0.5), batch(fixed, question)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=5)
    out = gate(**inputs, max_new_tokens=6, do_sample=False, streamer=streamer)
    told = "".join(streamer)
    assert told == tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert told.startswith(start)


def test_inside_the_gate_the_models_own_generate_is_it(fixed, model):  # noqa: F811
    before = model.generate
    with fixed.guard(threshold=0.5) as gate:
        assert model.generate is gate
        out = model.generate(**batch(fixed, "Who was Zorblat?"), max_new_tokens=4)
        assert fixed.tokenizer.decode(out[0]).count("I do not know") == 1
        with pytest.raises(RegardError, match="a gate stands"), gate:
            pass
        asked = pipeline("text-generation", model=model, tokenizer=fixed.tokenizer)
        told = asked([{"role": "user", "content": "Who was Zorblat?"}], max_new_tokens=4)
        assert told[0]["generated_text"][-1]["content"].startswith("I do not know")
    assert model.generate == before and "generate" not in vars(model)


def test_a_real_score_asks_through_the_gate_without_asking_itself(known, model):  # noqa: F811
    with known.guard(threshold=1.0) as gate:
        model.generate(**batch(known, "Who was Zorblat?"), max_new_tokens=4)
    assert not gate.decisions[0].answered and gate.decisions[0].score.weakest.explanation is not None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"threshold": 1.5}, "from 0 to 1"),
        ({"threshold": 0.5, "unnamed": "ask"}, "unnamed is"),
    ],
)
def test_a_gate_that_will_not_do_is_refused(fixed, options, said):
    with pytest.raises(RegardError, match=said):
        fixed.guard(**options)


def test_calls_that_cannot_be_read_are_refused(fixed):
    gate, inputs = fixed.guard(threshold=0.5), batch(fixed, "Where is Rome?", "Who was Zorblat?")
    for options, said in (
        ({}, "give input_ids"),
        ({"input_ids": inputs["input_ids"], "inputs_embeds": torch.zeros(2, 3, 16)}, "inputs_embeds"),
        ({"input_ids": inputs["input_ids"], "past_key_values": object()}, "cannot be parted"),
    ):
        with pytest.raises(RegardError, match=said):
            gate(**options)
