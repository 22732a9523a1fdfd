"""Hidden sinks as they are counted by hand; heads fitted to labelled prompts, kept in a file, and resumed."""

import json

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import regard
from regard.edit import ACT
from regard.edit.act import filter_heads, fit_heads, sink_map
from regard.edit.act.fitting import packaged, read_prompts
from regard.errors import RegardError
from regard.runtime import resumable
from regard.runtime.prompt import Prompt
from regard.runtime.recorded import logits_of
from regard.runtime.replay import Replay
from regard.tasks.labelled import word_tokenizer
from regard.tasks.sentiment import sentiment
from tests.edit.test_act_filter import model  # noqa: F401
from tests.support.families import FAMILIES

WORDS = ["say yes or no : red blue green sky sea sun is and yes no maybe not"]
SLOW = ACT(alpha=1.3, beta=0.1)


@pytest.fixture(scope="module")
def tokenizer():
    found = word_tokenizer(WORDS)
    found.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    return found


def prompts(count=6, right=None):
    words = ["red", "blue", "green", "sky", "sea", "sun"]
    return [
        Prompt(
            question=f"{words[n % 6]} is {words[(n + 2) % 6]}" + " and red" * (n % 3),
            options=("yes", "no"), right=n % 2 if right is None else right, begun="say :",
        )
        for n in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("options", [{"alpha": 1.3}, {"threshold": 0.15, "min_rows": 3}])
def test_sinks_are_those_of_whole_matrices(padding, options):
    family = FAMILIES["llama"]
    tiny = family.build()
    inputs = family.inputs(tiny, padding)
    found = sink_map(tiny, inputs, **options)
    dense = tiny(**inputs, output_attentions=True).attentions
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    expected, first = torch.zeros_like(found.sinks), torch.zeros_like(found.first)
    for layer, weights in enumerate(dense):
        for row, valid in enumerate(mask):
            places = valid.nonzero()[:, 0]
            part = weights[row][:, places][:, :, places]
            size = len(places)
            for t in range(size):
                mean = part[:, t:, t].sum(1) / (size - t)
                over = mean > options.get("threshold", options.get("alpha", 5) / size)
                over &= size - t >= options.get("min_rows", 1)
                if t:
                    expected[row, layer, :, places[t]] = over
                else:
                    first[row, layer] = over
    assert expected.any() and torch.equal(found.sinks, expected) and torch.equal(found.first, first)
    assert torch.equal(found.counts, expected.sum((1, 2)))
    assert torch.equal(found.heads, expected.any(-1)) and found.sites == ("text.0", "text.1")


def test_strings_that_are_sinks():
    tiny = FAMILIES["llama"].build()
    ids = torch.tensor([[7, 8, 9, 8, 7, 5, 6, 8]])
    found = sink_map(tiny, ids, 1.2)
    rows = {row["token"]: row for row in found.strings().rows()}
    assert rows and 9 in {7, 8, 9}
    for token, row in rows.items():
        places = [n for n in range(1, 8) if int(ids[0, n]) == token]
        assert row["places"] == len(places)
        assert row["heads"] == sum(int(found.counts[0, n]) for n in places)
        assert row["share"] == pytest.approx(row["heads"] / (8 * len(places)))
    ranked = [row["heads"] for row in found.strings().rows()]
    assert ranked == sorted(ranked, reverse=True)


def test_texts_of_two_tokens_have_none():
    assert not sink_map(FAMILIES["llama"].build(), torch.tensor([[5, 6]])).sinks.any()
    with pytest.raises(RegardError, match="takes token ids"):
        sink_map(FAMILIES["llama"].build(), {"inputs_embeds": torch.zeros(1, 3, 32)})


@pytest.mark.parametrize("metric", ["accuracy", "log_loss"])
def test_fitting_in_batches_is_a_forward_a_head(model, tokenizer, metric):  # noqa: F811
    asked = prompts(20)
    found = ACT(alpha=1.05, beta=0.0).fit(model, tokenizer, asked, metric=metric, batch_size=7)
    ordered = sorted(asked, key=lambda prompt: len(prompt.text))
    ids = [tokenizer(prompt.text, return_tensors="pt")["input_ids"] for prompt in ordered]
    answers = tokenizer.convert_tokens_to_ids(["yes", "no"])

    def scores(*edits):
        values = []
        for some, prompt in zip(ids, ordered, strict=True):
            with torch.no_grad(), regard.steer(model, *edits) if edits else torch.no_grad():
                last = model(some).logits[0, -1, answers]
            right = float(last.log_softmax(0)[prompt.right])
            values.append(float(last.argmax() == prompt.right) if metric == "accuracy" else right)
        return torch.tensor(values)

    plain = scores()
    assert found.heads.about["plain"] == pytest.approx(float(plain.mean()), abs=1e-4)
    assert found.changes.shape == (8, 20) and (metric == "accuracy" or found.changes.any())
    for row, (site, head) in list(enumerate(found.heads.names))[::3]:
        change = scores(ACT([(site, head)], alpha=1.05, beta=0.0)) - plain
        torch.testing.assert_close(found.changes[row], change, rtol=0, atol=1e-4)


def test_heads_without_a_hidden_sink_are_not_run(model, tokenizer, monkeypatch):  # noqa: F811
    ran = []
    plain = Replay.run

    def run(self, layer, edit, **options):
        ran.extend(edit.heads)
        return plain(self, layer, edit, **options)

    monkeypatch.setattr(Replay, "run", run)
    inputs = tokenizer([WORDS[0], "sky and sea say red is blue"], return_tensors="pt", padding=True)
    edit = ACT(alpha=2.6, layers=[0, 1, 2])
    found = filter_heads(model, dict(inputs), lambda logits: logits[:, 3], edit=edit)
    sinks = sink_map(model, dict(inputs), 2.6)
    having = sinks.heads.any(0)
    expected = [name for name in zip(found.heads.sites, found.heads.heads.tolist(), strict=True)
                if having[sinks.sites.index(name[0]), name[1]]]  # fmt: skip
    assert ran == expected and 0 < len(ran) < len(found.heads)
    idle = [row for row, name in enumerate(found.heads.names) if name not in ran]
    assert not found.changes[idle].any() and found.changes.any()


def test_what_chance_would_keep(model, tokenizer):  # noqa: F811
    found = ACT(alpha=1.3).fit(model, tokenizer, prompts(20), metric="log_loss")
    mean, most = found.by_chance()
    assert 0 < mean < 8 and mean <= most <= 8 and found.by_chance() == (mean, most)
    assert found.by_chance(1e3) == (0.0, 0)


def test_a_search_that_was_killed_goes_on(model, tokenizer, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(resumable, "EVERY", 0.0)
    monkeypatch.setattr(resumable.Resumable, "__exit__", lambda *_: None)  # as after SIGKILL
    asked, path, calls = prompts(20), tmp_path / "kept.json", []
    options = {"edit": SLOW, "metric": "log_loss", "batch_size": 12, "save": path, "progress": False}
    whole = fit_heads(model, tokenizer, asked, **{**options, "save": None})

    def counted(*given):
        calls.append(1)
        if len(calls) == stop:
            raise MemoryError
        return original(*given)

    original = resumable.Resumable.put
    monkeypatch.setattr(resumable.Resumable, "put", counted)
    stop = 12
    with pytest.raises(MemoryError):
        fit_heads(model, tokenizer, asked, **options)
    calls.clear()
    stop = 0
    again = fit_heads(model, tokenizer, asked, **options)
    assert len(calls) == 16 - 11
    torch.testing.assert_close(again.changes, whole.changes)


def test_fitted_heads_are_saved_and_refused_on_another_model(model, tokenizer, tmp_path):  # noqa: F811
    found = SLOW.fit(model, tokenizer, prompts(20), metric="log_loss")
    regard.save_edits(tmp_path / "act.json", model, found.act())
    [edit] = regard.load_edits(tmp_path / "act.json", model)
    assert list(edit.heads) == found.chosen() and edit.beta == 0.1 and edit.alpha == 1.3
    with pytest.raises(RegardError, match=r"act\.json was made for .* and this model is"):
        regard.load_edits(tmp_path / "act.json", FAMILIES["llama"].build())


@pytest.mark.parametrize("name", ["llava", "qwen2-vl"])
def test_heads_of_an_image_text_model_are_filtered(name):
    family = FAMILIES[name]
    tiny = family.build()
    inputs = family.inputs(tiny, "left")
    score = lambda last: last[:, 7] - last[:, 8]  # noqa: E731
    found = filter_heads(tiny, inputs, score, edit=ACT("all", alpha=1.3), progress=False)
    assert len(found.heads) == 8 and found.changes.any()
    with torch.no_grad():
        plain = score(logits_of(tiny, tiny(**inputs))[:, -1])
        for row, name_ in list(enumerate(found.heads.names))[::3]:
            with regard.steer(tiny, ACT([name_], alpha=1.3)):
                change = score(logits_of(tiny, tiny(**inputs))[:, -1]) - plain
            torch.testing.assert_close(found.changes[row], change, rtol=1e-3, atol=1e-4)
    told = sink_map(tiny, inputs, 1.3)
    assert told.sinks.shape == (2, 2, 4, inputs["input_ids"].shape[1]) and told.sinks.any()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (prompts(6, right=1), "all 6 prompts have the answer 'no'"),
        ([], "no prompts"),
        ([*prompts(2), Prompt(question="sky", options=("yes", "no"))], "prompt 2 does not say"),
        ([Prompt(question="sky", options=("not red", "not blue"), right=n) for n in (0, 1)], "same token"),
    ],
)
def test_prompts_that_cannot_tell(model, tokenizer, asked, said):  # noqa: F811
    with pytest.raises(RegardError, match=said):
        fit_heads(model, tokenizer, asked, metric="log_loss")


def test_other_bad_input(model, tokenizer):  # noqa: F811
    with pytest.raises(RegardError, match="metric is 'f1'"):
        fit_heads(model, tokenizer, prompts(), metric="f1")
    with pytest.warns(UserWarning, match="steps of 1/6"):
        found = fit_heads(model, tokenizer, prompts(), edit=ACT(alpha=100.0))
    assert found.chosen() == []
    with pytest.raises(RegardError, match="no head gains more than 0, so there is none to calibrate"):
        found.act()


def test_prompts_are_read_from_lines(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "sky", "options": ["yes", "no"], "right": 1}\n\n')
    [found] = read_prompts(path)
    assert found.options == ("yes", "no") and found.right == 1
    for line, said in [
        ("{", "line 1: it is no JSON"),
        ('{"question": "sky", "label": 1}', "line 1: it has 'label'"),
        (json.dumps({"question": "sky", "options": ["a", "b"], "right": 2}), "line 1: option 2 is said"),
        ("[1]", "line 1: it"),
    ]:
        path.write_text(line)
        with pytest.raises(RegardError, match=said):
            read_prompts(path)
    with pytest.raises(RegardError, match=r"none\.jsonl cannot be read"):
        read_prompts(tmp_path / "none.jsonl")


def test_made_sentences_share_no_adjective():
    data = sentiment(20, 40, seed=3)
    assert not data.words[0] & data.words[1] and all(len(some) == 10 for some in data.words)
    for some, words, count in ((data.calibration, data.words[0], 20), (data.test, data.words[1], 40)):
        assert len({text for text, _ in some}) == count and sum(label for _, label in some) == count // 2
        assert all(sum(word in text for word in words) == 2 for text, _ in some)
    assert sentiment(20, 40, seed=3) == data != sentiment(20, 40, seed=4)
    calibration, _ = packaged(20, 40, 3)
    assert [prompt.text for prompt in calibration] == [text for text, _ in data.calibration]
    with pytest.raises(RegardError, match="there are 1 to 320"):
        sentiment(400, 4)
