"""`regard inspect --lens retrieval`: the numbers of Python, a page, and refusals."""

import csv
import io
import json

import numpy as np
import pytest

from regard.cli import retrieval_looking
from regard.lens.retrieval_heads import detect
from regard.tasks.needles import Needles
from regard.weights import load
from tests.lens.test_retrieval_heads import copier, prompts, word_tokenizer
from tests.support import folders


@pytest.fixture(scope="module")
def copying(tmp_path_factory):
    """The model whose head 0 copies by construction."""
    folder = tmp_path_factory.mktemp("copier")
    copier(positions=128).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def answered(monkeypatch):
    """Prompts that the copier answers stand for those of packaged facts."""
    made = lambda source, *_: Needles(tuple(prompts(source.tokenizer)))  # noqa: E731
    monkeypatch.setattr(retrieval_looking, "_prompts", made)


def test_numbers_are_those_of_python(regard, copying, answered, tmp_path):
    code, out, err = regard(
        "inspect", copying, "--lens", "retrieval", "--json", tmp_path / "a.json", "--csv", tmp_path / "a.csv"
    )
    assert code == 0, err
    model, tokenizer = load(copying)
    found = detect(model, tokenizer, prompts(tokenizer), progress=False)
    told = json.loads((tmp_path / "a.json").read_text())
    assert told["counted"] == found.counted == 3 and told["answered"] == found.answered
    rows = list(csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text())))
    for name in ("score", "active", "first", "second"):
        np.testing.assert_allclose([float(row[name]) for row in rows], found[name])
        np.testing.assert_allclose([row[name] for row in told["heads"]], found[name])
    assert told["prompts"][0]["response"] == found.records[0].response
    assert "On 3 prompts of" in out and found.findings()[0].text in out and "100   0" in out


def test_the_page_shows_the_map_the_list_and_patterns(copying, answered, tmp_path):
    from regard.cli import main

    page = tmp_path / "page.html"
    assert main(["inspect", str(copying), "--lens", "retrieval", "--report", str(page)]) == 0
    text = page.read_text()
    for part in ("Leading heads", "How much of the needle was found again", "retrieval score of at least"):
        assert part in text
    assert '"kind":"exact"' in text.replace(" ", ""), "patterns of a prompt"


def test_packaged_facts_are_hidden_at_two_depths(tmp_path):
    from regard.weights import Source

    folder = folders.llama(tmp_path / "tiny", max_position_embeddings=300)
    made = retrieval_looking._prompts(Source.find(str(folder)), 6, 0)
    assert len(made) == 6 and len(made.facts) == 3 and {asked.depth for asked in made} == {0.2, 0.8}
    assert max(len(asked.ids) for asked in made) <= 256


def test_what_cannot_be_looked_at_is_refused(refusal, tmp_path):
    small = folders.llama(tmp_path / "small", max_position_embeddings=40)
    tiny = folders.llama(tmp_path / "tiny")
    for folder, words, said in (
        (tiny, ("--task", "ioi"), "--lens retrieval has one task"),
        (tiny, ("--prompts", 1), "--prompts is 1; it must be from 4 to 48"),
        (tiny, ("--text", "words"), "makes prompts of its own; leave out --text"),
        (tiny, ("entropy",), "give it alone"),
        (tiny, (), "the needle and the question alone take"),
        (small, (), "takes 40 tokens, too few to hide a fact in"),
        (folders.bert(tmp_path / "bert"), ("--prompts", 4), "does not generate"),
    ):
        assert said in refusal("inspect", folder, "--lens", "retrieval", *words)
