"""What `regard diff` says beside each lens' numbers: attention by span, head outputs, next tokens, text."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import regard as library
from regard.cli.effects import Flow, flows_changed
from regard.cli.effects_shown import side_by_side
from regard.cli.parts import parse_spans, places
from regard.edit import ForceAttention
from regard.errors import RegardError
from tests.support.folders import TEXT

LONG = " ".join([TEXT] * 3)
EDIT = "force-attention heads=0.1 to=0"


@pytest.fixture
def told(regard, models):
    """Run `regard diff` on the tiny Llama, and return what it wrote as JSON."""

    def run(*words, edit=EDIT):
        code, out, err = regard(
            "diff", models / "llama", "--edit", edit, "--text", LONG, "--no-report", "--json", "-", *words
        )
        assert (code, err) == (0, "")
        return json.loads(out)

    return run


@pytest.fixture(scope="module")
def llama(models):
    model = AutoModelForCausalLM.from_pretrained(models / "llama", attn_implementation="eager").eval()
    return model, AutoTokenizer.from_pretrained(models / "llama")


def test_attention_by_span_is_that_of_the_dense_weights(told, llama):
    model, tokenizer = llama
    word = LONG.split()[2]
    rows = {row["span"]: row for row in told("--span", f"word={word}")["attention_by_span"]}
    encoded = tokenizer(LONG, return_offsets_mapping=True, return_tensors="pt")
    with torch.no_grad():
        dense = torch.stack(model(encoded["input_ids"], output_attentions=True).attentions)[:, 0]
    where = [
        LONG[a:b].strip() != "" and any(
            s <= a + (len(LONG[a:b]) - len(LONG[a:b].lstrip())) < s + len(word)
            for s in range(len(LONG)) if LONG.startswith(word, s)
        )
        for a, b in encoded["offset_mapping"][0].tolist()
    ]  # fmt: skip
    assert rows["word"]["tokens"] == sum(where) > 0
    share = dense.mean((0, 1, 2))
    assert rows["word"]["before"] == pytest.approx(float(share[torch.tensor(where)].sum()), abs=1e-5)
    assert rows["first token"]["before"] == pytest.approx(float(share[0]), abs=1e-5)
    three = ("first token", "word", "the rest")
    assert sum(rows[name]["before"] for name in three) == pytest.approx(1, abs=1e-5)
    assert sum(rows[name]["after"] for name in three) == pytest.approx(1, abs=1e-5)
    assert rows["first token"]["after"] > rows["first token"]["before"] + 0.05


def test_a_hidden_sink_is_told_and_an_even_head_has_none():
    even = torch.eye(12).cumsum(0)
    even = (even / even.sum(1, keepdim=True)).double()
    drawn = torch.eye(12).double()
    drawn[3:] = 0
    drawn[3:, 3] = 1
    before = Flow({"text.0": torch.stack([even.sum(0), drawn.sum(0)])})
    after = Flow({"text.0": torch.stack([even.sum(0), even.sum(0)])})
    spans, heads = flows_changed(before, after, {})
    sinks = next(row for row in spans.rows() if row["span"] == "hidden sinks")
    assert sinks["before"] == pytest.approx(9 / 12 / 2)
    assert sinks["after"] == pytest.approx(float(even[:, 3].sum()) / 12 / 2)
    assert heads["to hidden sinks: change"][0] == 0 > heads["to hidden sinks: change"][1]


def test_head_outputs_moved(told, llama):
    found = told("--span", "a=" + LONG.split()[0], edit="scale-heads heads=0.1 factor=0.5")
    moved = {(r["site"], r["head"]): r["output moved"] for r in found["head_effects"]}
    assert moved["text.0", 1] == pytest.approx(0.5, abs=1e-5)
    assert moved["text.0", 0] == moved["text.0", 3] == 0
    assert all(0 < moved["text.1", h] < 2 for h in range(4))


def test_next_tokens_and_generated_text_are_the_models_own(told, llama):
    model, tokenizer = llama
    found = told("--generate", "6")
    ids = tokenizer(LONG, return_tensors="pt")["input_ids"]
    with torch.no_grad(), library.steer(model, *_edits()):
        after = model(ids).logits[0, -1].log_softmax(-1)
        text = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    with torch.no_grad():
        before = model(ids).logits[0, -1].log_softmax(-1)
    expected = float((before.exp() * (before - after)).sum())
    assert found["next_tokens"]["divergence"] == pytest.approx(expected, abs=1e-5)
    tops = [row["before"] for row in found["next_tokens"]["tokens"]]
    assert max(tops) == pytest.approx(float(before.exp().max()), abs=1e-5)
    assert found["generated"]["after"] == tokenizer.decode(text)
    assert found["turns"][0]["KL"] >= found["turns"][-1]["KL"] > 0


def _edits():
    return [ForceAttention([(0, 1)], to=0)]


def test_an_edit_of_nothing_moves_nothing(told):
    found = told("--generate", "5", edit="scale-heads heads=0.1 factor=1")
    assert all(row["change"] == 0 for row in found["attention_by_span"])
    assert all(row["output moved"] == 0 for row in found["head_effects"])
    assert found["turns"] is None and found["generated"]["same_tokens"] == 5


def test_the_terminal_and_the_page_show_them(regard, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = regard("diff", models / "llama", "--edit", EDIT, "--text", LONG, "--generate", "4")
    assert (code, err) == (0, "")
    for said in ("share of attention, mean over heads and rows", "next token after the text", "1: ",
                 "generated (", "before", "of 8 heads moved"):  # fmt: skip
        assert said in out, out
    page = (tmp_path / "regard-diff.html").read_text("utf-8")
    for title in ("Attention by span", "Next token", "Generated text", "output moved"):
        assert title in page


def test_sentences_and_long_texts(llama):
    _, tokenizer = llama
    text = "The cat sat. The dog ran. " * 20
    found = places(tokenizer, text, [], [], True)
    assert 2 <= len(found) <= 13
    together = np.sum(list(found.values()), 0)
    assert together.max() == 1 and together[0] == 0 and together[1:].all()


def test_chat_roles_are_the_spans(llama):
    from regard.cli.parts import as_chat

    _, tokenizer = llama
    template = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    monkey = type(tokenizer).chat_template if hasattr(type(tokenizer), "chat_template") else None
    tokenizer.chat_template = template
    try:
        chat = json.dumps([{"role": "system", "content": TEXT}, {"role": "user", "content": "the"}])
        rendered, marks = as_chat(tokenizer, chat, "it")
        found = places(tokenizer, rendered, [], marks, False)
    finally:
        tokenizer.chat_template = monkey
    assert list(found) == ["system", "user"] and found["system"].sum() > found["user"].sum() > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--span", "fact"), "--span takes NAME=WORDS"),
        (("--span", "fact=zebra crossing"), "the text does not have the words"),
        (("--span", "a=e", "--span", "a=e"), "twice"),
        (("--span", "first token=e"), "uses itself"),
        (("--generate", "-1"), "must be 0 at least"),
        (("--generate", "100000"), "asks for 100000 more"),
        (("--chat",), "has no chat template"),
    ],
)
def test_refusals(regard, models, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = regard("diff", models / "llama", "--edit", EDIT, "--text", LONG, *words)
    assert code == 2 and said in err, err
    assert err.count("\n") == 1 and out == "" and not list(tmp_path.iterdir())


def test_side_by_side_fits():
    lines = side_by_side("one two three four five six", "six\n\nseven", 40)
    assert all(len(line) <= 40 for line in lines) and lines[0].split() == ["before", "|", "after"]
    assert parse_spans(["a=b=c"], "b=c") == [("a", "b=c")]
    with pytest.raises(RegardError):
        parse_spans(["a= "], "b")
