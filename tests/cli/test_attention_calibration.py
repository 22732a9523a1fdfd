"""`regard run attention-calibration`: sinks of a text, heads fitted and saved, saved edits measured."""

import json

import pytest

from tests.support import folders

SLUG = ("run", "attention-calibration")


@pytest.fixture
def data(tmp_path):
    """Prompts of two classes, a line each."""
    words = [f"w{n}" for n in range(20)]
    lines = [
        {
            "question": f"the {words[n % 20]} {words[(3 * n) % 20]} wrote one {words[(7 * n) % 20]}",
            "options": ["keeper", "line"], "right": n % 2, "begun": "a",
        }
        for n in range(40)
    ]  # fmt: skip
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_hidden_sinks_of_a_text(regard, models):
    words = (*SLUG, "--model", models / "llama", "--sinks", "--text", folders.TEXT, "--alpha", 1.5)
    code, out, err = regard(*words)
    assert code == 0, err
    assert "of 8 heads have a sink at the first token" in out and "places" in out
    code, out, _ = regard(*words, "--json", "-")
    told = json.loads(out)
    assert told["tokens"] == 12 and told["of"] == 8 and told["strings"]
    assert {row["token"] for row in told["strings"]} <= set(folders.TEXT.split())


def test_heads_are_fitted_saved_resumed_and_measured(regard, models, data, tmp_path):
    saved, kept = tmp_path / "act.json", tmp_path / "kept.json"
    words = (
        *SLUG, "--model", models / "llama", "--data", data, "--samples", 20, "--metric", "log_loss",
        "--layers", "0-1", "--alpha", 1.3, "--save", saved, "--resume", kept,
    )  # fmt: skip
    code, out, err = regard(*words)
    assert code == 0, err
    assert "8 heads tried on 20 prompts" in out and "where chance would in" in out
    assert "On 20 other prompts:" in out and "in random heads" in out and f"--edits {saved}" in out
    code, out, _ = regard(*words, "--json", "-")
    told = json.loads(out)
    assert told["tried"] == len(told["all"]) == 8 and told["samples"] == 20
    written = json.loads(saved.read_text())["edits"][0]
    assert written["name"] == "act" and written["options"]["alpha"] == 1.3
    assert written["options"]["heads"] == [head[:2] for head in told["heads"]]
    assert all(gain > 0 for _, _, gain in told["heads"])
    code, out, err = regard(
        *SLUG, "--model", models / "llama", "--data", data, "--samples", 20, "--edits", saved, "--json", "-"
    )
    assert code == 0, err
    found = json.loads(out)["test"]
    assert found["with them"]["log_loss"] != found["as it is"]["log_loss"]
    code, out, err = regard("diff", models / "llama", "--edits", saved, "--text", folders.TEXT, "--no-report")
    assert code == 0, err


def test_nothing_is_kept_where_no_head_helps(regard, models, data, tmp_path):
    saved = tmp_path / "act.json"
    words = (*SLUG, "--model", models / "llama", "--data", data, "--samples", 20, "--layers", "0-1")
    code, out, err = regard(*words, "--alpha", 1000)
    assert code == 0 and "ACT raises it in 0 heads" in out and "No head is kept." in out
    code, _, err = regard(*words, "--alpha", 1000, "--save", saved)
    assert code == 2 and "there is none to calibrate" in err and not saved.exists()


def test_bad_input_ends_in_a_sentence(regard, models, data, tmp_path):
    base = (*SLUG, "--model", models / "llama", "--data", data)
    one = tmp_path / "one.jsonl"
    one.write_text("\n".join(line for line in data.read_text().splitlines() if '"right": 1' in line))
    for words, said in [
        ((*base, "--samples", 20, "--alpha", 0), "alpha is 0"),
        ((*base, "--samples", 20, "--beta", 2), "beta is 2"),
        ((*base, "--samples", 39), "has 40 prompts"),
        ((*base, "--samples", 1), "they take 2 or more"),
        ((*base, "--samples", 20), "leaves out the first two layers and the last, and there are 2"),
        ((*base, "--samples", 20, "--layers", "7"), "7"),
        ((*base, "--samples", 20, "--save", tmp_path / "none" / "act.json"), "no such folder"),
        ((*base, "--edits", "act.json", "--save", "b.json"), "searches nothing"),
        ((*SLUG, "--model", models / "llama", "--data", one, "--samples", 10), "all 10 prompts have the"),
        ((*SLUG, "--model", models / "llama", "--data", tmp_path / "no.jsonl"), "cannot be read"),
    ]:  # fmt: skip
        code, _, err = regard(*words)
        assert code == 2 and said in err, (words, err)


def test_edits_of_another_model_are_refused(regard, models, data, tmp_path):
    saved = tmp_path / "act.json"
    code, _, err = regard(
        *SLUG, "--model", models / "llama", "--data", data, "--samples", 20, "--metric", "log_loss",
        "--layers", "0-1", "--alpha", 1.3, "--save", saved,
    )  # fmt: skip
    assert code == 0, err
    other = folders.llama(tmp_path / "other", num_hidden_layers=3)
    code, _, err = regard(*SLUG, "--model", other, "--data", data, "--samples", 20, "--edits", saved)
    assert code == 2 and "act.json was made for" in err
