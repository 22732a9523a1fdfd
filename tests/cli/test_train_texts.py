"""`regard train --labelled` and the commands of adversarial attention: what they print, write and refuse."""

import json

import pytest

SMALL = ("--steps", "3", "--every", "2", "--batch", "8", "--longest", "32")


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [f"the film was {('good', 'dull')[n % 2]} on day {n},{('up', 'down')[n % 2]}" for n in range(30)]
    (tmp_path / "data.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    (tmp_path / "more.txt").write_text("\n".join(f"a good film {n}" for n in range(12)))
    (tmp_path / "words.txt").write_text("good\ndull\n")
    (tmp_path / "one.csv").write_text("text,label\na,up\nb,up\n")
    return tmp_path


def test_it_trains_goes_on_and_what_it_wrote_is_attacked(regard, files):
    words = ("train", "--labelled", "data.csv", "--adversary", "at", "--eps", "1", "--lexicon", "words.txt")
    code, out, err = regard(*words, *SMALL)
    assert (code, err) == (0, "")
    assert "24 texts to train on and 6 held out, of down, up" in out and "adversary at" in out
    assert "attacked  at random" in out and "attention on the words that matter" in out
    folder = files / "regard-train" / "bilstm-data-at"
    told = json.loads((folder / "log.json").read_text())
    assert told["adversary"] == {"kind": "AttentionAdversary", "eps": 1.0, "lam": 1.0, "variant": "at"}
    assert len(told["losses"]) == 3 and [row["step"] for row in told["held_out"]] == [0, 2, 3]
    assert regard(*words, *SMALL)[1] == out
    code, out, err = regard(
        "run", "attention-adversarial-training", "--model", folder, "--labelled", "data.csv", "--eps", "0,2",
        "--json", "-",
    )  # fmt: skip
    assert (code, err) == (0, "")
    again = json.loads(out)
    assert [row["eps"] for row in again["robustness"]] == [0, 2]
    assert again["robustness"][0]["accuracy"] == told["robustness"][0]["accuracy"] == told["accuracy"]


def test_texts_without_labels_and_an_encoder(regard, files):
    code, out, err = regard(
        "train", "--labelled", "data.csv", "--model", "distilbert-tiny", "--adversary", "vat", "--eps", "1",
        "--unlabelled", "more.txt", "--perturb-layers", "1", "--precision", "bf16", "--accumulate", "2",
        *SMALL, "--out", "out",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "12 texts without a label from more.txt" in out
    code, out, err = regard(
        "run", "attention-virtual-adversarial-training", "--model", "out", "--unlabelled", "more.txt",
        "--eps", "0,2", "--json", "-",
    )  # fmt: skip
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["texts"] == 12 and [row["eps"] for row in told["moved"]] == [2]
    assert regard("train", "--labelled", "data.csv", "--model", "out", *SMALL, "--out", "tuned")[0] == 0
    (files / "none.txt").write_text("\n")
    code, out, err = regard(
        "train", "--labelled", "data.csv", "--adversary", "vat", "--eps", "1", "--unlabelled", "none.txt",
        *SMALL,
    )  # fmt: skip
    assert code == 0 and "texts with a label were used alone" in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--labelled", "none.csv"), "there is no file none.csv"),
        (("--labelled", "one.csv"), "one class, 'up'; a classifier needs two"),
        (("--labelled", "data.csv", "--label-column", "kind"), "no column 'kind'"),
        (("--labelled", "data.csv", "--adversary", "at"), "--adversary at needs --eps"),
        (("--labelled", "data.csv", "--eps", "1"), "--eps is an option of --adversary"),
        (("--labelled", "data.csv", "--adversary", "at", "--eps", "-1"), "eps is -1.0"),
        (
            ("--labelled", "data.csv", "--adversary", "at", "--eps", "1", "--xi", "1"),
            "options of --adversary vat",
        ),
        (("--labelled", "data.csv", "--unlabelled", "more.txt"), "--unlabelled is used by --adversary vat"),
        (("--labelled", "data.csv", "--dim", "8"), "--dim is an option of a language model"),
        (("--labelled", "data.csv", "--images", "digits"), "--images and --labelled were given"),
        (
            ("--images", "digits", "--model", "nat-nano", "--eps", "1"),
            "--eps is an option of a classifier of texts",
        ),
        (("--adversary", "at"), "--adversary is an option of a classifier of texts"),
        (("--labelled", "data.csv", "--model", "nowhere/at/all"), "nowhere/at/all"),
        (("--labelled", "data.csv", "--perturb-layers", "x"), "takes numbers and ranges"),
    ],
)
def test_bad_input_is_refused_and_nothing_written(refusal, files, words, sentence):
    before = sorted(files.iterdir())
    assert sentence in refusal("train", *words)
    assert sorted(files.iterdir()) == before


def test_commands_refuse_what_is_no_classifier(refusal, files):
    run = ("run", "attention-adversarial-training", "--labelled", "data.csv")
    assert "--model is missing" in refusal(*run)
    assert "--eps takes lengths from 0" in refusal(*run, "--eps", "x")
