"""`regard run explanation-agreement`: the numbers of Python, a page, and refusals."""

import json

import numpy as np
import pytest

from regard.cli import main
from regard.lens.explanations import compare_methods
from regard.weights import load
from tests.support import folders
from tests.support.folders import TEXT

METHODS = ["gradnorm", "occlusion", "average", "rollout"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folders.llama(tmp_path_factory.mktemp("kept") / "llama")


def ran(capsys, *words):
    capsys.readouterr()
    code = main(["run", "explanation-agreement", *map(str, words)])
    return code, *capsys.readouterr()


def test_numbers_are_those_of_python(folder, capsys, tmp_path):
    texts = [TEXT, "one line a day the keeper"]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    code, out, _ = ran(
        capsys, "--model", folder, "--text", tmp_path / "texts.txt", "--methods", *METHODS, "--seed", 3,
        "--json", tmp_path / "a.json", "--report", tmp_path / "page.html",
    )  # fmt: skip
    assert code == 0 and "2 texts" in out and "~ marks what random scores reach" in out
    assert "should not be used to judge an explanation" in out
    model, tokenizer = load(folder)
    found = compare_methods(model.eval(), tokenizer, texts, METHODS, seed=3)
    told = json.loads((tmp_path / "a.json").read_text())
    for method in METHODS:
        for said, explanation in zip(told["explanations"][method], found.explanations[method], strict=True):
            np.testing.assert_allclose(said["values"], explanation.values, rtol=1e-4, atol=1e-6)
    rows = found.agreement().table.rows()
    for said, row in zip(told["agreement"], rows, strict=True):
        assert said["mean"] == pytest.approx(row["mean"], abs=1e-6)
    assert "rollout" in (tmp_path / "page.html").read_text()


def test_one_text_with_a_target_and_top_k(folder, capsys):
    words = ["--model", folder, "--text", TEXT, "--methods", "gradnorm", "average"]
    code, out, _ = ran(capsys, *words, "--target", "keeper", "day", "--topk", 2, "--drop-first")
    assert code == 0 and "scores of the tokens, " in out and "keeper" in out


REFUSED = [
    (["--methods", "ig"], "names one method"),
    (["--methods", "ig", "saliency"], "saliency"),
    (["--measure", "cosine"], "--measure is 'cosine'; it must be one of kendall"),
    (["--topk", "0"], "--topk is 0"),
    (["--target", "1", "2", "3"], "--target takes one or two"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_refusals(folder, capsys, words, said):
    code, out, err = ran(capsys, "--model", folder, "--text", TEXT, *words)
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1


def test_a_tokenizer_without_padding_asks_for_a_baseline(folder, capsys, tmp_path):
    import shutil

    other = shutil.copytree(folder, tmp_path / "other")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = other / name
        if path.exists():
            told = json.loads(path.read_text())
            told.pop("pad_token", None)
            path.write_text(json.dumps(told))
    code, _, err = ran(capsys, "--model", other, "--text", TEXT, "--methods", "gradnorm", "average")
    assert code == 2 and "has no [PAD]; give the id of a token in its place with --baseline." in err
