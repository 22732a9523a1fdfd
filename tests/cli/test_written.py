"""JSON and CSV hold what the Python API gives, to the last digit, under the keys that the docs name."""

import csv
import io
import json
import math
from dataclasses import dataclass

import pytest
import torch

import regard as library
from regard.cli.written import _dump
from regard.lens import LENSES, Patterns
from tests.support.folders import TEXT

READ_TEXT = sorted(set(LENSES) - {"image-maps"})
EVERY = ["--lens", *READ_TEXT]


@pytest.fixture(scope="module")
def seen(models):
    """The same text under every lens, by way of Python."""
    model, tokenizer = library.load(models / "llama")
    lenses = [LENSES[name](name=name) for name in READ_TEXT]
    with library.watch(model, *lenses) as seen, torch.no_grad():
        model(**tokenizer(TEXT, return_tensors="pt"))
    return seen


def same(told, value):
    return told is None if isinstance(value, float) and not math.isfinite(value) else told == value


def test_json_holds_every_row_of_every_lens(models, regard, seen, tmp_path):
    path = tmp_path / "x.json"
    assert regard("inspect", models / "llama", "--text", TEXT, *EVERY, "--json", path)[0] == 0
    document = json.loads(path.read_text())
    assert set(document["on_text"]) == set(READ_TEXT)
    for name, told in document["on_text"].items():
        rows = list(seen[name].table.rows())
        assert len(told["rows"]) == len(rows) > 0
        for got, row in zip(told["rows"], rows, strict=True):
            assert list(got) == list(row)
            assert all(same(got[key], row[key]) for key in row), (name, got, row)


def test_json_holds_the_patterns_and_the_masses(models, regard, seen):
    code, out, _ = regard("inspect", models / "llama", "--text", TEXT, *EVERY, "--json", "-")
    document = json.loads(out)
    assert code == 0
    patterns = document["on_text"]["patterns"]["patterns"]
    assert [p["site"] for p in patterns] == ["text.0", "text.1"]
    for told in patterns:
        found = seen["patterns"].pattern(told["site"])
        torch.testing.assert_close(torch.tensor(told["weights"]), found.weights, rtol=0, atol=0)
        assert told["tokens"] == found.tokens.tolist()
        assert (told["heads"], told["width"], told["peaks"]) == ([0, 1, 2, 3], 1, None)
    for told in document["on_text"]["column-mass"]["mass"]:
        assert told["heads"] == seen["column-mass"].mass[told["site"]].tolist()
        assert told["width"] == 1


def test_json_says_what_it_was_taken_from(models, regard):
    _, out, _ = regard("inspect", models / "llama", "--text", TEXT, "--lens", "induction", "--json", "-")
    document = json.loads(out)
    assert list(document) == ["format", "regard", "model", "text", "probe", "on_text", "on_probe"]
    assert document["format"] == 1
    assert document["model"] == {
        "name": str(models / "llama"), "class": "LlamaForCausalLM", "layers": 2, "heads": 8,
        "dtype": "float32", "device": "cpu",
    }  # fmt: skip
    assert document["text"] == {"origin": "the words given", "tokens": 12}
    assert document["probe"]["tokens"] == 64
    about = document["on_probe"]["induction"]["about"]
    assert about["lens"] == "induction" and about["definition"] and about["source"]


def test_csv_has_one_line_a_head(models, regard, seen, tmp_path):
    path = tmp_path / "x.csv"
    assert regard("inspect", models / "llama", "--text", TEXT, *EVERY, "--csv", path)[0] == 0
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    assert [(r["site"], r["head"]) for r in rows] == [(f"text.{i}", str(h)) for i in (0, 1) for h in range(4)]
    lenses = {name.partition(".")[0] for name in rows[0]} - {"site", "head"}
    assert lenses == set(READ_TEXT) - {"patterns", "residual-norm", "outliers"}
    for row in rows:
        for name, told in row.items():
            lens, _, column = name.partition(".")
            if lens in LENSES and not column.endswith("@probe"):
                value = seen[lens].table[column][rows.index(row)]
                assert (told == "") if math.isnan(value) else float(told) == value


def test_json_and_csv_agree_on_the_probe(models, regard, tmp_path):
    words = ["inspect", models / "llama", "--text", TEXT, "--lens", "induction", "sinks"]
    assert regard(*words, "--json", tmp_path / "x.json", "--csv", tmp_path / "x.csv")[0] == 0
    told = json.loads((tmp_path / "x.json").read_text())["on_probe"]["induction"]["rows"]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "x.csv").read_text())))
    assert [float(row["induction.score@probe"]) for row in rows] == [row["score"] for row in told]
    assert "sinks.first@probe" not in rows[0]


def test_pooled_patterns_keep_their_peaks(models, regard, monkeypatch):
    @dataclass(frozen=True, kw_only=True, eq=False)
    class Pooled(Patterns):
        max_tokens: int | None = 8

    monkeypatch.setattr("regard.cli.looking.Patterns", Pooled)
    words = ["--lens", "patterns", "--heads", "1.2", "--json", "-"]
    _, out, _ = regard("inspect", models / "llama", "--text", TEXT, *words)
    (told,) = json.loads(out)["on_text"]["patterns"]["patterns"]
    weights, peaks = torch.tensor(told["weights"]), torch.tensor(told["peaks"])
    assert told["width"] == 2 and weights.shape == (1, 6, 6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 6))
    assert bool((peaks <= 1).all()) and bool((peaks > 0).any())


@pytest.mark.parametrize(
    "value",
    [{}, [], None, {"a": []}, {"a": {"b": [1, 2.5, None]}}, [[1], [2, [3, {}]]], "é\n", {"x": [[], {}]}],
)
def test_dump_is_json(value):
    assert json.loads(_dump(value)) == value


def test_dump_puts_a_row_on_a_line():
    assert _dump({"rows": [{"a": 1, "b": 2}, {"a": 3, "b": 4}]}) == (
        '{\n "rows": [\n  {"a": 1, "b": 2},\n  {"a": 3, "b": 4}\n ]\n}'
    )
