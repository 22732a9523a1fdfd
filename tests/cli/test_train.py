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


def test_meap_hides_inputs_and_goes_on(regard, tmp_path):
    words = ("--objective", "meap", "--mask-ratio", "0.2", "--mask-ramp", "4", "--accumulate", "2")
    words = (*words, "--precision", "bf16", *SMALL, "--json", "-")
    code, whole, err = regard("train", *words, "--out", tmp_path / "a")
    assert (code, err) == (0, "")
    told = json.loads(whole)
    assert told["model"]["vocabulary"] == 513 and told["objective"]["ratio"] == {
        "start": 0.0,
        "end": 0.2,
        "steps": 4,
    }
    from regard.models.saved import load_decoder

    tokenizer = load_decoder(tmp_path / "a")[1]
    assert tokenizer.token_to_id("[MASK]") == told["objective"]["mask_id"] == 512
    assert "[MASK]" not in tokenizer.decode([512, 65])
    code, again, _ = regard("train", *words, "--out", tmp_path / "a")
    assert code == 0 and json.loads(again)["losses"] == told["losses"]
    other = [word if word != "0.2" else "0.1" for word in words]
    assert "inputs.ratio.end was 0.2 there and is 0.1" in regard("train", *other, "--out", tmp_path / "a")[2]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--mask-ratio", "0.1"), "--mask-ratio is an option of --objective meap"),
        (("--objective", "meap", "--mask-ratio", "1"), "ratio is 1.0"),
        (("--objective", "meap", "--mask-ramp", "0"), "steps is 0"),
        (("--accumulate", "99"), "accumulate is 99, and a batch has 16 sequences"),
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
