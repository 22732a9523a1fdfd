"""`regard run meap`: needles and attention of two models, rows from examples, and what is refused."""

import json

import pytest
import torch

from regard.cli import main
from regard.objectives.meap import add_mask_token
from tests.objectives.test_meap import tiny, words


@pytest.fixture
def regard(capsys):
    """Run the command; returns (exit code, standard output, standard error)."""

    def run(*given):
        capsys.readouterr()
        code = main(["run", "meap", *map(str, given)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def saved(tmp_path):
    """Two tiny models of bytes: one plain, the other moved, with [MASK] in its vocabulary."""
    from regard.models.tiny_llama import tiny_llama
    from regard.tasks.corpus import packaged

    torch.manual_seed(0)
    for name in ("plain", "masked"):
        model, tokenizer = tiny_llama(packaged(256))
        if name == "masked":
            add_mask_token(model, tokenizer)
        tokenizer.pad_token = tokenizer.eos_token = tokenizer.decode([10])
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


def test_needles_and_attention_of_two_models(regard, saved):
    asked = ("--length", 300, "--facts", 2, "--depth", 0, 1)
    code, out, err = regard("--model", saved / "masked", "--against", saved / "plain", *asked)
    assert code == 0, err
    assert "Facts found in texts of 300 tokens, 2 at each depth:" in out and "a masked key receives" in out
    code, out, err = regard("--model", saved / "masked", "--against", saved / "plain", *asked, "--json", "-")
    told = json.loads(out)
    assert code == 0 and set(told["needles"]) == {str(saved / "masked"), str(saved / "plain")}
    focus = told["focus"]
    assert focus["decay"] == pytest.approx(1 - focus["masked_b"] / focus["masked_a"])
    assert 0 < focus["even"] < 0.2 and focus["answer_a"] > 0
    again = json.loads(
        regard("--model", saved / "plain", "--against", saved / "masked", *asked, "--json", "-")[1]
    )
    assert again["focus"]["masked_a"] == pytest.approx(focus["masked_b"])
    alone = json.loads(regard("--model", saved / "plain", *asked, "--json", "-")[1])
    assert next(iter(alone["needles"].values())) == [[0, 0.0], [1, 0.0]] and "focus" not in alone


def test_rows_are_made_of_examples(regard, saved, tmp_path):
    one = {"instruction": "Say it.", "output": "to be or not to be, that is the question. " * 2}
    (tmp_path / "some.jsonl").write_text(json.dumps(one) + "\n" + json.dumps({**one, "output": "no"}) + "\n")
    given = ("--model", saved / "plain", "--examples", tmp_path / "some.jsonl")
    code, out, err = regard(*given)
    assert code == 0, err
    assert out.startswith("3 rows of 2 answers are in") and "1 were too short" in out
    rows = [json.loads(line) for line in (tmp_path / "some.rows.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and rows[1]["input_ids"].count(256) == 8
    code, out, _ = regard(*given, "--layout", "concat", "--rows", tmp_path / "x.jsonl", "--json", "-")
    assert code == 0 and json.loads(out)["rows"] == 2
    assert "no end-of-text" not in out


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("--rows", "x.jsonl"), "--rows goes with --examples"),
        (("--ratio", "1"), "--ratio is 1.0"),
        (("--facts", "99"), "--facts is 99; it goes from 1 to 24"),
        (("--depth", "2"), "a depth is 2.0"),
        (("--examples", "nowhere.jsonl"), "nowhere.jsonl cannot be read"),
        (("--examples", "nowhere.jsonl", "--rows", "no/where.jsonl"), "no/where.jsonl cannot be written to"),
        (("--examples", "nowhere.jsonl", "--against", "x"), "--against compares models"),
    ],
)
def test_bad_input_is_one_sentence(regard, saved, tmp_path, monkeypatch, given, sentence):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    code, out, err = regard("--model", saved / "plain", *given)
    assert code == 2 and sentence in err and out == "" and err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_models_that_read_otherwise_are_refused(regard, saved, tmp_path):
    tiny().save_pretrained(tmp_path / "other")
    words().save_pretrained(tmp_path / "other")
    code, _, err = regard("--model", saved / "plain", "--against", tmp_path / "other")
    assert code == 2 and "different vocabularies; compare models that read alike" in err
