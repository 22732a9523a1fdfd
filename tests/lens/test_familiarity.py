"""Self-familiarity: forms and masks, scores, thresholds, and the gate in front of generate()."""

import json
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from regard.errors import RegardError, UnsupportedModel
from regard.lens.familiarity import (
    SelfFamiliarity,
    Threshold,
    aggregate,
    baselines,
    calibrate,
    everyday_concepts,
)
from regard.lens.familiarity.automaton import Phrases
from regard.lens.familiarity.forms import blot_out, guess_forms, masked_forms
from regard.lens.familiarity.prompts import EXPLAIN, GUESS, Template
from regard.lens.familiarity.search import constrained_search
from regard.lens.familiarity.threshold import fit

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
SIZES = {"beams": 3, "explain_tokens": 6, "guess_tokens": 2, "batch_size": 4, "progress": False}


@pytest.fixture(scope="module")
def tokenizer():
    """Every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(["<s>", "</s>", "<pad>", *alphabet])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    found.chat_template = CHAT
    return found


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    made.lm_head.weight.data *= 8
    return made


@pytest.fixture
def known(model, tokenizer):
    return SelfFamiliarity(model, tokenizer, **SIZES)


@pytest.mark.parametrize(
    ("text", "concept", "mode", "masked"),
    [
        ("Start with art: the arts.", "art", "words", "Start with ...: the ...."),
        ("Start with art.", "art", "official", "St... with ...."),
        ("Parisian life in PARIS, Paris's own", "Paris", "words", "... life in ..., ... own"),
        ("the Treaty of Rome is a treaty of sorts", "Treaty of Rome", "words", "the ... is a ... of sorts"),
        ("C++ and c++ are C++.", "C++", "words", "... and ... are ...."),
        ("nothing here", "Paris", "words", "nothing here"),
    ],
)
def test_a_concept_is_blotted_out(text, concept, mode, masked):
    assert blot_out(text, concept, mode) == masked


def test_the_official_mask_is_replacement_of_the_longest_form_first():
    text, concept = "The Big Ben, BIG BEN and big benches of Ben", "Big Ben"
    expected = text
    parts = [f(p) for p in ("Big", "Ben", "Big Ben") for f in (str, str.lower, str.upper, str.capitalize)]
    for form in sorted(set(parts), key=lambda x: -len(x)):
        expected = expected.replace(form, "...")
    assert blot_out(text, concept, "official") == expected
    assert masked_forms("the Bank")[0] in ("THE BANK", "The bank", "the Bank", "the bank")
    assert "the" not in masked_forms("the Bank")
    assert guess_forms("gravity") == ["gravity", "GRAVITY", "Gravity", " gravity", " GRAVITY", " Gravity"]
    with pytest.raises(RegardError, match="mode is"):
        blot_out(text, concept, "fuzzy")


@pytest.mark.parametrize(
    ("scores", "how", "one"),
    [
        ([0.2, 0.8], "weighted", 0.4),
        ([0.2, 0.8, 0.5], "weighted", (0.2 + 0.4 + 0.125) / 1.75),
        ([0.6, 0.8, 0.5], "min", 0.5),
        ([0.6, 0.8, 0.5], "first", 0.6),
        ([], "weighted", 0.0),
        ([], "min", 0.0),
    ],
)
def test_scores_are_aggregated(scores, how, one):
    assert aggregate(scores, how) == pytest.approx(one)


def test_a_score_is_what_the_method_says_written_out(known, model, tokenizer):
    concept = "Big Ben"
    found = known.score(concept)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": EXPLAIN.format(concept)}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    explanation = tokenizer.decode(out, skip_special_tokens=True).strip()
    assert found.explanation == explanation and found.masked == blot_out(explanation, concept)
    back = known.prompts.ids(known.prompts.text(GUESS.format(found.masked)))
    phrases = [tokenizer(form, add_special_tokens=False)["input_ids"] for form in guess_forms(concept)]
    forced = constrained_search(model, [back], [Phrases(phrases)], beams=3, extra=2, ends=[1], pad=2)[0]
    assert found.logprobs == pytest.approx(forced.logprobs, abs=1e-4)
    assert found.score == pytest.approx(math.exp(forced.mean), rel=1e-4) and 0 < found.score <= 1
    assert "big ben" in found.answer.lower() and len(found.tokens) == len(found.logprobs)
    assert json.loads(json.dumps(found.as_dict()))["concept"] == concept


def test_concepts_score_alike_alone_and_together_and_once(known, monkeypatch):
    names = ["Rome", "Big Ben", "Rome", "x"]
    together = known.score_all(names)
    assert together[0] == together[2]
    for name, found in zip(names, together, strict=True):
        assert known.score(name).score == pytest.approx(found.score, rel=1e-4)
    asked = []
    monkeypatch.setattr(known, "explain", lambda some: asked.extend(some) or ["a text"] * len(some))
    known.score_all(names)
    assert asked == ["Rome", "Big Ben", "x"]


def test_an_instruction_counts_its_rarest_concept_most(known):
    text = "Did Mozart study photosynthesis near the Big Ben?"
    found = known.score_instruction(text)
    assert [each.concept for each in found.concepts] == ["Big Ben", "Mozart", "photosynthesis"]
    scores = [each.score for each in found.concepts]
    assert found.score == pytest.approx(aggregate(scores)) and found.weakest.score == min(scores)
    assert known.score_instruction("Who are you?").score == 0
    named = known.score_instruction(text, concepts=["Vienna"])
    assert [each.concept for each in named.concepts] == ["Vienna"]


def test_an_empty_explanation_scores_nothing(known, monkeypatch):
    monkeypatch.setattr(known, "explain", lambda some: [""] * len(some))
    assert known.score("Rome").score == 0


def test_an_explanation_too_long_for_the_model_is_cut_and_said(model, tokenizer):
    known = SelfFamiliarity(model, tokenizer, **SIZES)
    with pytest.warns(UserWarning, match="was cut to fit"):
        found = known.guess_back(["Rome"], ["a long text " * 60])[0]
    assert 0 < found.score <= 1
    with pytest.raises(RegardError, match="ask for fewer explain_tokens"):
        SelfFamiliarity(model, tokenizer, **{**SIZES, "explain_tokens": 900}).score("Rome")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beams": 1}, "beams is 1"),
        ({"explain_tokens": 0}, "explain_tokens is 0"),
        ({"guess_tokens": True}, "guess_tokens is True"),
        ({"masking": "all"}, "masking is"),
        ({"aggregate": "mean"}, "aggregate is"),
        ({"template": "alpaca"}, "template is"),
    ],
)
def test_options_out_of_range_are_refused(model, tokenizer, options, said):
    with pytest.raises(RegardError, match=said):
        SelfFamiliarity(model, tokenizer, **{**SIZES, **options})


def test_concepts_and_models_that_will_not_do_are_refused(known, model, tokenizer):
    for concepts, said in (
        ([], "is empty"), ([""], "no letter"), (["Rome", "  "], "no letter"), ("Rome", "must be a list"),
    ):  # fmt: skip
        with pytest.raises(RegardError, match=said):
            known.score_all(concepts)
    with pytest.raises(UnsupportedModel, match="no causal language model"):
        config = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        SelfFamiliarity(T5ForConditionalGeneration(config), tokenizer)
    with pytest.raises(UnsupportedModel, match="a tokenizer is needed"):
        SelfFamiliarity(model, None)


def test_an_instruction_is_read_out_of_its_template(tokenizer):
    for kind in ("chat", "plain", lambda text: f"Q: {text} A:"):
        template = Template(tokenizer, kind)
        ids = template.ids(template.text("Where is Rome?"))
        assert template.instruction_of(ids) == "Where is Rome?"
    turns = [("user", "Hi, I am Tom"), ("assistant", "Hello"), ("user", "Where is Rome?")]
    chat = [{"role": role, "content": content} for role, content in turns]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert Template(tokenizer, "chat").instruction_of(tokenizer(text)["input_ids"]) == "Where is Rome?"
    bare = tokenizer("Where is Rome?")["input_ids"]
    assert Template(tokenizer, "chat").instruction_of(bare) == "Where is Rome?"


def test_a_threshold_is_the_middle_of_the_interval_of_the_5th_percentile():
    from scipy.stats import bootstrap

    scores = np.random.default_rng(0).beta(2, 5, 60)
    value, low, high = fit(scores)
    found = bootstrap(
        (scores,), lambda x, axis: np.percentile(x, 5, axis=axis), method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    assert (low, high) == pytest.approx((found.low, found.high)) and value == pytest.approx((low + high) / 2)
    assert fit([0.4] * 12)[0] == pytest.approx(0.4)


def test_a_labelled_threshold_tells_both_sides_apart():
    value, low, high = fit([0.5, 0.6, 0.7, 0.3, 0.9], [0.1, 0.2, 0.25, 0.05])
    assert value == pytest.approx(0.275) and low <= value <= high
    mixed = fit([0.2, 0.6, 0.7], [0.1, 0.3])[0]
    assert mixed in (pytest.approx(0.15), pytest.approx(0.45))


def test_a_threshold_is_kept_with_its_model(known, model, tokenizer, tmp_path):
    names = [f"name {i}" for i in range(10)]
    found = known.calibrate(names, ["zorb", "quax"], resume=tmp_path / "kept.json")
    assert found.method == "labelled" and set(found.familiar) == set(names) and len(found.unfamiliar) == 2
    found.save(tmp_path / "h.json")
    again = Threshold.load(tmp_path / "h.json")
    assert again == found
    again.check(known)
    with pytest.raises(RegardError, match="other settings .beams 3 there and 4 here"):
        again.check(SelfFamiliarity(model, tokenizer, **{**SIZES, "beams": 4}))
    other = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "num_hidden_layers": 1}))
    with pytest.raises(RegardError, match="this threshold was made for"):
        again.check(SelfFamiliarity(other, tokenizer, **SIZES))
    known.explain = None  # everything is in the file
    assert calibrate(known, names, ["zorb", "quax"], resume=tmp_path / "kept.json").value == pytest.approx(
        found.value, rel=1e-5
    )
    (tmp_path / "bad.json").write_text('{"format": "something"}')
    for path, said in (("bad.json", "holds no threshold"), ("none.json", "cannot read")):
        with pytest.raises(RegardError, match=said):
            Threshold.load(tmp_path / path)


def test_a_search_of_other_weights_is_not_gone_on_with(known, tokenizer, model, tmp_path):
    names = [f"name {i}" for i in range(10)]
    known.calibrate(names, resume=tmp_path / "kept.json")
    torch.manual_seed(1)
    other = LlamaForCausalLM(model.config).eval()
    with pytest.raises(RegardError, match="another model or metric"):
        SelfFamiliarity(other, tokenizer, **SIZES).calibrate(names, resume=tmp_path / "kept.json")


@pytest.mark.parametrize(
    ("concepts", "unfamiliar", "said"),
    [
        (["Rome"] * 12, [], "ten familiar concepts at least, not 1"),
        ([f"n{i}" for i in range(10)], ["zorb"], "two unfamiliar"),
        ([f"n{i}" for i in range(10)], ["n1", "zorb"], "both familiar and unfamiliar"),
        ([], [], "is empty"),
    ],
)
def test_too_few_concepts_make_no_threshold(known, concepts, unfamiliar, said):
    with pytest.raises(RegardError, match=said):
        known.calibrate(concepts, unfamiliar)


def test_everyday_concepts_are_many_and_distinct():
    found = everyday_concepts()
    assert len(found) >= 200 and len(set(found)) == len(found) and all(x == x.strip() and x for x in found)


def test_mean_logprobs_are_those_of_a_full_forward(known, model):
    pairs = [([5, 6, 7], [8, 9]), ([5], [7, 8, 9, 10]), ([4, 4, 4, 4, 4], [6])]
    for (prompt, rest), found in zip(pairs, baselines.mean_logprobs(known, pairs), strict=True):
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + rest])).logits[0].log_softmax(-1)
        expected = [logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(rest)]
        assert found == pytest.approx(float(torch.stack(expected).mean()), abs=1e-5)


def test_every_baseline_gives_a_number_a_concept(known, tokenizer):
    names, texts = ["Rome", "Big Ben"], ["a town", "a clock"]
    assert len(baselines.explanation_likelihood(known, names, texts)) == 2
    backward = baselines.backward_likelihood(known, names, texts)
    back = known.prompts.ids(known.prompts.text(GUESS.format("a town")))
    pair = (back, tokenizer("Rome", add_special_tokens=False)["input_ids"])
    assert backward[0] == pytest.approx(baselines.mean_logprobs(known, [pair])[0], abs=1e-5)
    assert baselines.token_count(known, names) == [-4, -7]
    assert baselines.word_frequency(["the", "zorblat"])[0] > baselines.word_frequency(["the", "zorblat"])[1]
    drawn = baselines.agreement(known, names, samples=2, tokens=4, seed=1)
    assert drawn == baselines.agreement(known, names, samples=2, tokens=4, seed=1)
    assert all(0 <= x <= 1 for x in drawn)
    state = torch.get_rng_state()
    baselines.agreement(known, names, samples=2, tokens=2)
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(RegardError, match="two explanations"):
        baselines.agreement(known, names, samples=1)
    assert len(baselines.name_likelihood(known, names)) == 2


@pytest.mark.real
def test_smollm_knows_photosynthesis_better_than_a_word_of_syllables(smollm):
    known = SelfFamiliarity(*smollm, beams=4, explain_tokens=20, guess_tokens=4, progress=False)
    real, invented = known.score_all(["photosynthesis", "Kordex syndrome"])
    assert real.score > invented.score
    assert "photosynthesis" in real.answer.lower() and "photosynthesis" not in real.masked.lower()
    assert 0 <= baselines.says_yes(known, ["photosynthesis"])[0] <= 1
