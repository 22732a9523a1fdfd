"""`regard train`: what it prints and writes, that it goes on, and what it refuses."""

import json

import pytest

SMALL = ("--steps", "6", "--every", "3", "--dim", "16", "--layers", "1", "--batch", "2", "--length", "16")


def test_it_trains_any_mechanism_by_name_and_goes_on(regard, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = regard("train", "--mechanism", "linear", *SMALL)
    assert (code, err) == (0, "")
    assert out.startswith("linear: ") and "step      6" in out and "bits a byte" in out and "sample:" in out
    folder = tmp_path / "regard-train" / "linear"
    told = json.loads((folder / "log.json").read_text())
    assert told["steps"] == 6 and len(told["losses"]) == 6
    assert [row["step"] for row in told["held_out"]] == [0, 3, 6]
    assert regard("train", "--mechanism", "linear", *SMALL)[:2] == (code, out)

    from regard.models.saved import load_decoder

    model, tokenizer = load_decoder(folder)
    assert model.options["mechanism"] == {"mechanism": "linear"} and tokenizer.get_vocab_size() == 512


def test_options_of_the_mechanism_a_text_and_json(regard, tmp_path):
    text = tmp_path / "own.txt"
    text.write_text("to be or not to be, that is the question. " * 60)
    words = ("--mechanism", "sliding-window", "--set", "window=4", "--text", text, "--vocabulary", "260")
    code, out, err = regard("train", *words, *SMALL, "--out", tmp_path / "out", "--json", "-")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["model"]["mechanism"] == {"mechanism": "sliding-window", "window": 4}
    assert told["model"]["vocabulary"] == 260


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--mechanism", "linaer"), "no mechanism 'linaer'; did you mean linear?"),
        (("--mechanism", "sliding-window"), "sliding-window needs 'window'"),
        (("--set", "window"), "--set takes OPTION=VALUE"),
        (("--set", "window=3"), "softmax takes no 'window'"),
        (("--steps", "0"), "steps is 0"),
        (("--heads", "3"), "which 3 heads do not divide"),
        (("--text", "nowhere.txt"), "nowhere.txt cannot be read"),
        (("--vocabulary", "9"), "vocabulary is 9"),
        (("--length", "100000"), "tokens; sequences of length 100000 need"),
        (("--device", "abacus"), "abacus"),
        (("--positions", "alibi", "--mechanism", "linear"), "no scores to add ALiBi's bias to"),
    ],
)
def test_bad_input_is_refused_and_nothing_written(refusal, tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    assert sentence in refusal("train", *words)
    assert list(tmp_path.iterdir()) == []
