"""`regard run retrieval-heads`: what is lost without the heads, and how alike two files are."""

import json

import numpy as np
import pytest

from regard.cli import main
from regard.lens.retrieval_heads import command as own
from regard.lens.retrieval_heads import detect, write_official
from regard.tasks.needles import Needles
from tests.lens.test_retrieval_heads import copier, prompts, word_tokenizer


@pytest.fixture
def regard(capsys):
    """Run the command; returns (exit code, standard output, standard error)."""

    def run(*words):
        code = main(["run", "retrieval-heads", *map(str, words)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def copying(tmp_path, monkeypatch):
    """The copier on disk; its own prompts stand for those of packaged facts."""
    copier(positions=128).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    made = lambda tokenizer, *_, **__: Needles(tuple(prompts(tokenizer)))  # noqa: E731
    for name in ("needle", "copying", "knowing"):
        monkeypatch.setattr(own, name, made)
    return tmp_path


def test_without_the_head_nothing_is_found_and_without_another_all(regard, copying):
    words = ("--model", copying, "--mask", 1, "--draws", 2, "--length", 60)
    code, out, err = regard(*words, "--json", "-")
    assert code == 0, err
    told = json.loads(out)
    assert told["heads"] == [["text.0", 0]]
    recall = {how: found["needle"] for how, found in told["recall"].items()}
    assert recall == {
        "no head off": [1.0],
        "the 1 leading off": recall["the 1 leading off"],
        "1 random off": [1.0] * 2,
    }
    assert recall["the 1 leading off"][0] < 0.5
    code, out, _ = regard(*words)
    assert code == 0 and "heads 0.0 (layer.head)" in out and "100% (100%-100%)" in out


def test_a_list_of_another_model_is_refused(regard, copying, tmp_path):
    other = copier(positions=64)
    tokenizer = word_tokenizer()
    found = detect(other, tokenizer, prompts(tokenizer), steps=4, progress=False)
    found.list(1).save(tmp_path / "other.json")
    code, _, err = regard("--model", copying, "--list", tmp_path / "other.json", "--mask", 1, "--length", 60)
    assert code == 2 and "this list of retrieval heads was made for" in err
    code, _, err = regard("--model", copying, "--mask", 0)
    assert code == 2 and "numbers from 1" in err


def test_two_files_are_correlated(regard, tmp_path):
    source = np.random.default_rng(0)
    one = source.random((4, 6))
    two = one + 0.1 * source.random((4, 6))
    for name, scores in (("a", one), ("b", two), ("c", one[:3])):
        told = {f"{layer}-{head}": [x] for layer, row in enumerate(scores) for head, x in enumerate(row)}
        (tmp_path / f"{name}.json").write_text(json.dumps(told))
    code, out, _ = regard("--correlate", tmp_path / "a.json", tmp_path / "b.json", "--json", "-")
    found = json.loads(out)
    assert code == 0 and found["heads"] == 24
    assert found["pearson"] == pytest.approx(np.corrcoef(one.ravel(), two.ravel())[0, 1])
    code, _, err = regard("--correlate", tmp_path / "a.json", tmp_path / "c.json")
    assert code == 2 and "only models of one shape" in err
    code, _, err = regard("--correlate", tmp_path / "a.json", tmp_path / "none.json")
    assert code == 2 and "cannot be read" in err


def test_a_list_and_an_official_file_are_read_alike(regard, tmp_path):
    model, tokenizer = copier(), word_tokenizer()
    found = detect(model, tokenizer, prompts(tokenizer), steps=4, progress=False)
    write_official(found, tmp_path / "official.json")
    found.list(1).save(tmp_path / "list.json")
    code, out, err = regard("--correlate", tmp_path / "official.json", tmp_path / "list.json")
    assert code == 0 and "Pearson 1.00" in out, err
