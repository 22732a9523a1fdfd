"""Retrieval heads: against attention written out, and a model whose copying head is made by hand."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import regard
from regard.edit import ScaleHeads
from regard.errors import NothingObserved, RegardError, UnsupportedModel
from regard.lens.retrieval_heads import Copying, answer, detect, read_official, write_official
from regard.lens.retrieval_heads.answering import stop_tokens
from regard.runtime.head_list import HeadList
from regard.tasks.needles import Asked
from tests.support.families import FAMILIES

WORDS = ("end", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven")
SIZE = 16
STEPS = 6


def copier(positions=64):
    """One layer whose head 0 looks at the word that is next in WORDS, and writes it; head 1 is idle."""
    config = GPT2Config(
        vocab_size=SIZE, n_embd=2 * SIZE, n_head=2, n_layer=1, n_positions=positions,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    same = torch.eye(SIZE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.zero_()
            if "ln_" in name and name.endswith("weight"):
                parameter.fill_(1.0)
        model.transformer.wte.weight[:, :SIZE] = same
        joined = model.transformer.h[0].attn.c_attn.weight
        queries, keys, values = (joined[:SIZE, i * 2 * SIZE : i * 2 * SIZE + SIZE] for i in range(3))
        queries.copy_(4 * same)
        keys[1:, :-1] = torch.eye(SIZE - 1)
        values.copy_(same)
        model.transformer.h[0].attn.c_proj.weight[:SIZE, SIZE:] = same
        model.lm_head.weight[:, SIZE:] = same
    return model


@pytest.fixture(scope="module")
def counting():
    """The copier, and a tokenizer of its words."""
    return copier(), word_tokenizer()


def word_tokenizer():
    """A tokenizer of one token a word of WORDS; others are unknown."""
    known = {word: place for place, word in enumerate(WORDS)} | {f"w{i}": i for i in range(12, SIZE)}
    made = Tokenizer(models.WordLevel(known, unk_token="w15"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "w15", "eos_token": "end", "pad_token": "w12"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def asked(tokenizer, before, needle, after, answer=None):
    """A prompt with the words of `needle` in it, of which `answer` is to be found again; default all."""
    prompt = " ".join((*before, *needle, *after))
    answer = needle if answer is None else answer
    begin = len(before) + needle.index(answer[0])
    ids = torch.tensor(tokenizer(prompt)["input_ids"])
    return Asked(prompt, ids, " ".join(answer), prompt, (begin, begin + len(answer)))


def prompts(tokenizer):
    """Three prompts of different lengths; the last word asks for the needle that follows it in WORDS."""
    return [
        asked(tokenizer, ["nine", "one"], ["three", "four", "five"], ["eleven", "two"]),
        asked(
            tokenizer, ["ten", "eight", "one"], ["three", "four", "five", "six"], ["eleven", "eleven", "two"]
        ),
        asked(tokenizer, ["one"], ["seven", "eight", "nine"], ["two", "six"]),
    ]


def test_the_head_made_to_copy_scores_one_and_the_other_nothing(counting):
    model, tokenizer = counting
    found = detect(model, tokenizer, prompts(tokenizer), steps=4, progress=False)
    assert found.counted == 3 and found.answered == 1.0
    assert found["score"].tolist() == [1.0, 0.0] and found["active"].tolist() == [1.0, 0.0]
    assert found.top("score", 1) == [("text.0", 0, 1.0)]
    assert found.records[0].response.startswith("three four five")
    assert 0 < found.chance < 0.3
    assert "1 of 2 heads have a retrieval score" in found.findings()[0].text


def test_batches_padded_on_the_left_equal_prompts_alone(counting):
    model, tokenizer = counting
    several, alone = (
        detect(model, tokenizer, prompts(tokenizer), steps=4, batch_size=size, progress=False)
        for size in (3, 1)
    )
    np.testing.assert_array_equal(several.each, alone.each)
    assert several.records == alone.records


def test_only_the_span_counts_and_only_what_is_written(counting):
    model, tokenizer = counting
    part = asked(tokenizer, ["nine"], ["three", "four", "five", "six"], ["two"], ["four", "five", "six"])
    elsewhere = asked(tokenizer, ["nine", "three", "four"], ["ten", "eight"], ["two"])
    found = detect(model, tokenizer, [part], steps=3, progress=False)
    assert found["score"].tolist() == [pytest.approx(2 / 3), 0.0], "three, then four and five of the three"
    found = detect(model, tokenizer, [elsewhere], steps=3, progress=False)
    assert found.counted == 0 and np.isnan(found["score"]).all()


def test_frequency_counts_a_position_again_and_recall_does_not(counting):
    model, tokenizer = counting
    loop = asked(tokenizer, ["nine"], ["three"], ["two"])
    model = copier()
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[3, 2] += 4.0
        model.transformer.h[0].attn.c_attn.weight[3, 3] = 0.0
    recall = detect(model, tokenizer, [loop], steps=3, progress=False)
    often = detect(model, tokenizer, [loop], steps=3, score="frequency", progress=False)
    assert recall.records[0].response == "three three three"
    assert recall["score"][0] == 1.0 and often["score"][0] > 1.0


def test_nothing_counts_after_the_end(counting):
    model, tokenizer = counting
    with torch.no_grad():
        span = torch.zeros(1, 7, dtype=torch.bool)
        span[0, 2:5] = True
        ids = prompts(tokenizer)[0].ids[None]
        with regard.watch(model, Copying(stops=[4]), spans={"needle": span}) as seen:
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0
            )
    assert seen[Copying]["recall"][0] == pytest.approx(2 / 3), "three, four; five comes after the stop"


def written_out(model, inputs, span):
    """Return recall and frequency by the definition: one forward a step, all attention returned."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    layers = len(model(**inputs, output_attentions=True).attentions)
    heads, size = model.config.num_attention_heads, span.sum(1)
    copied = torch.zeros(len(ids), layers, heads, ids.shape[1], dtype=torch.bool)
    steps = torch.zeros(len(ids), layers, heads)
    for _ in range(STEPS):
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, output_attentions=True)
        new = out.logits[:, -1].argmax(-1)
        for layer, weights in enumerate(out.attentions):
            for row in range(len(ids)):
                for head in range(heads):
                    peak = int(weights[row, head, -1].argmax())
                    if peak < span.shape[1] and span[row, peak] and ids[row, peak] == new[row]:
                        copied[row, layer, head, peak] = True
                        steps[row, layer, head] += 1
        ids = torch.cat([ids, new[:, None]], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return copied.sum(-1) / size[:, None, None], steps / size[:, None, None]


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_scores_equal_attention_written_out(family, padding, cache):
    model = FAMILIES[family].build("eager")
    inputs = FAMILIES[family].inputs(model, padding)
    inputs["input_ids"] = inputs["input_ids"] % 4 + 5
    with torch.no_grad():
        model.lm_head.weight[9:] = 0.0
        model.lm_head.weight[:5] = 0.0
        model.generation_config.eos_token_id = None
        span = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        span[:, 3:8] = True
        expected = written_out(model, inputs, span)
        with regard.watch(model, Copying(), spans={"needle": span}) as seen:
            model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, cache_implementation=cache)
    assert expected[1].sum() > 0, "something was copied"
    found = seen.lens(Copying).each()
    for name, values in zip(("recall", "frequency"), expected, strict=True):
        got = torch.stack(list(found[name].values()), 1)
        torch.testing.assert_close(got.float(), values.float())
    means = seen[Copying]
    np.testing.assert_allclose(means.grid("recall"), expected[0].mean(0).numpy(), atol=1e-6)


def test_a_prompt_is_read_without_weights(counting, monkeypatch):
    """Rows are opened one at a time, whatever the length of the prompt."""
    model, tokenizer = counting
    opened = []
    keep = Copying.weights
    monkeypatch.setattr(
        Copying, "weights", lambda self, b: (opened.append(b.weights.shape[2]), keep(self, b))
    )
    detect(model, tokenizer, prompts(tokenizer), steps=3, progress=False)
    assert set(opened) == {1}


def test_a_search_goes_on_where_it_was_stopped(counting, tmp_path, monkeypatch):
    model, tokenizer = counting
    path, whole = (
        tmp_path / "kept.jsonl",
        detect(model, tokenizer, prompts(tokenizer), steps=4, progress=False),
    )
    detect(model, tokenizer, prompts(tokenizer)[:2], steps=4, resume=path, progress=False)
    path.write_text(path.read_text() + '{"key": "cut off in the mid')
    answered, generate = [], model.generate
    monkeypatch.setattr(
        model, "generate", lambda **k: (answered.append(len(k["input_ids"])), generate(**k))[1]
    )
    path.write_text(path.read_text().rpartition("\n")[0] + "\n")
    again = detect(model, tokenizer, prompts(tokenizer), steps=4, resume=path, progress=False)
    assert answered == [1]
    np.testing.assert_array_equal(again.each, whole.each)
    assert again.records == whole.records
    detect(model, tokenizer, prompts(tokenizer), steps=4, resume=path, progress=False)
    assert answered == [1], "all of it is known"
    with pytest.raises(RegardError, match="other prompts or another model"):
        detect(model, tokenizer, prompts(tokenizer), steps=3, resume=path, progress=False)
    path.write_text("no such file\nof ours\n")
    with pytest.raises(RegardError, match="no file that a search"):
        detect(model, tokenizer, prompts(tokenizer), steps=4, resume=path, progress=False)


def test_without_an_answer_there_is_no_ranking(counting):
    model, tokenizer = counting
    lost = asked(tokenizer, ["nine"], ["three", "ten", "one"], ["two"])
    found = detect(model, tokenizer, [lost], steps=1, progress=False)
    assert found.counted == 0 and found.top("score", 5) == []
    assert found.findings()[0].text.startswith("None of 1 prompt with a needle was answered")
    with pytest.raises(NothingObserved, match="0 of 1 prompts were answered"):
        found.list()


def test_official_files(counting, tmp_path):
    model, tokenizer = counting
    found = detect(model, tokenizer, prompts(tokenizer), steps=4, progress=False)
    path = tmp_path / "scores.json"
    write_official(found, path)
    assert json.loads(path.read_text()) == {"0-0": [1.0] * 3, "0-1": [0.0] * 3}
    read = read_official(path)
    assert read.rank_correlation(found, "score") == 1.0 and read.top("score", 1) == [("text.0", 0, 1.0)]
    for content, said in (
        ("[1]", "is no file of scores"),
        ('{"0-0": []}', "counts no prompt"),
        ("{}", "counts no"),
    ):
        path.write_text(content)
        with pytest.raises(RegardError, match=said):
            read_official(path)


def test_switching_the_head_off_loses_the_answer(counting):
    model, tokenizer = counting
    asks = prompts(tokenizer)
    heads = detect(model, tokenizer, asks, steps=4, progress=False).list(1)
    plain = answer(model, tokenizer, asks, steps=4, progress=False).mean
    for mode in ("zero", "uniform"):
        off = answer(model, tokenizer, asks, ScaleHeads(heads=heads, mode=mode), steps=4, progress=False).mean
        assert plain == 1.0 and off < 0.5
    other = ScaleHeads(heads=heads.control(0))
    assert answer(model, tokenizer, asks, other, steps=4, progress=False).mean == 1.0


def test_what_cannot_be_searched_is_refused(counting):
    model, tokenizer = counting
    asks = prompts(tokenizer)
    nowhere = Asked("one", asks[0].ids, "two", "one")
    for given, options, said in (
        ([nowhere], {}, "does not stand in its prompt"),
        ([], {}, "no prompts"),
        (asks, {"score": "mean"}, "score is 'mean'"),
        (asks, {"steps": 0}, "steps is 0"),
        (asks, {"steps": 60}, "takes 64 tokens, and the longest prompt has 10 with 60 to come"),
    ):
        with pytest.raises(RegardError, match=said):
            detect(model, tokenizer, given, **options)
    with pytest.raises(UnsupportedModel, match="does not generate"):
        detect(FAMILIES["bert"].build(), tokenizer, asks)


def test_ends_of_answers(counting):
    model, tokenizer = counting
    assert stop_tokens(model, tokenizer) == [0]


def test_the_list_knows_its_model(counting, tmp_path):
    model, tokenizer = counting
    heads = detect(model, tokenizer, prompts(tokenizer), steps=4, name="copier", progress=False).list(1)
    heads.save(tmp_path / "heads.json")
    read = HeadList.load(tmp_path / "heads.json")
    assert list(read) == [("text.0", 0)] and read.about["kind"] == "retrieval"
    with pytest.raises(
        RegardError, match=r"this list of retrieval heads was made for copier \(GPT2LMHeadModel"
    ):
        regard.steer(FAMILIES["llama"].build(), ScaleHeads(heads=read))
