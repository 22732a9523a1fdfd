"""`regard run sae-circuits` and `regard run chinchilla-circuits` on a tiny model, and what they refuse."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from regard.cli import main
from regard.runtime import HeadTable
from tests.support.characters import characters
from tests.tasks.test_prompts import tokenizer

SAE, CHOICE = "sae-circuits", "chinchilla-circuits"


def saved(folder, words, layers):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.4,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("circuits")
    return {
        "words": saved(root / "words", tokenizer(), 4),
        "letters": saved(root / "letters", characters(), 2),
    }


def ran(capsys, *words):
    capsys.readouterr()
    code = main(["run", *(str(word) for word in words)])
    return code, *capsys.readouterr()


def test_scores_of_two_files(capsys, folders, tmp_path):
    (tmp_path / "with.txt").write_text("Mary and John\nThen, Tom gave\n\nThe war of\n")
    (tmp_path / "without.txt").write_text("Mary and Tom\nThen, Tom lost\nThe war is\n")
    files = tmp_path / "with.txt", tmp_path / "without.txt"
    few = ("--epochs", 5, "--codes", 10, "--examples", 3, "--trials", 2, "--l1", 0.001)
    table, told = tmp_path / "heads.json", tmp_path / "told.json"
    code, out, err = ran(
        capsys,
        SAE,
        *files,
        "--model",
        folders["words"],
        *few,
        "--save",
        table,
        "--json",
        told,
        "--skip-first",
    )
    assert code == 0, err
    assert "16 heads, 3 + 3 prompts" in out and "mean_diff" in out and "Against" not in out
    kept, found = HeadTable.load(table), json.loads(told.read_text())
    assert len(kept) == len(found["heads"]) == 16 and kept["sae"].tolist() == [
        row["sae"] for row in found["heads"]
    ]


def test_scores_of_a_task_against_path_patching(capsys, folders):
    few = ("--epochs", 5, "--codes", 10, "--examples", 3, "--trials", 1, "--l1", 0.001, "--count", 4)
    code, out, err = ran(
        capsys, SAE, "--task", "ioi", "--model", folders["words"], *few, "--against", "paths", "--json", "-"
    )
    assert code == 0, err
    found = json.loads(out)
    assert set(found["against"]) >= {"sae", "mean_diff", "layer"} and found["circuit"]
    assert found["against"]["layer"]["auc"] is None or 0 <= found["against"]["layer"]["auc"] <= 1


def test_multiple_choice(capsys, folders, tmp_path):
    told = tmp_path / "told.json"
    code, out, err = ran(
        capsys, CHOICE, "--model", folders["letters"], "--count", 4, "--compress", "1.2", "--json", told
    )
    assert code == 0, err
    assert "right by the label (chance 25%" in out and "Net logit of the right label" in out
    found = json.loads(told.read_text())
    assert [row["rank"] for row in found["ranks"]] == [0, 1, 2, 3, 4, 4]
    assert {row["form"] for row in found["forms"]} >= {"A to D", "random letters", "numbers"}
    last = found["ranks"][-1]
    assert last["attention"] < 1e-5 < found["ranks"][0]["attention"] and last["net"] == pytest.approx(
        found["net"], abs=1e-3
    )
    data = tmp_path / "small_test.csv"
    data.write_text("".join(f"Q{n},a,b,c,d,{'ABCD'[n % 4]}\n" for n in range(9)))
    code, out, err = ran(capsys, CHOICE, data, "--model", folders["letters"], "--shots", 1)
    assert code == 0 and "8 questions" in out, err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((SAE,), "give POSITIVES and NEGATIVES, or --task"),
        ((SAE, "a.txt"), "give POSITIVES and NEGATIVES"),
        ((SAE, "a.txt", "b.txt", "--task", "ioi"), "or --task"),
        ((SAE, "/no/a.txt", "/no/b.txt"), "cannot read /no/a.txt"),
        ((SAE, "--task", "ioi", "--count", "1"), "--count is 1"),
        ((SAE, "a.txt", "b.txt", "--against", "paths"), "needs --task"),
        ((SAE, "--task", "ioi", "--against", "poems"), "no published circuit of 'poems'"),
        ((SAE, "--task", "ioi", "--save", "/no/x.json"), "no folder /no"),
        ((CHOICE, "--count", "3"), "--count is 3"),
        ((CHOICE, "/no/q.csv"), "cannot read /no/q.csv"),
        ((CHOICE, "--compress", "23"), "takes LAYER.HEAD"),
    ],
)
def test_bad_input_is_one_sentence(capsys, words, told):
    code, out, err = ran(capsys, *words)
    assert (code, out, len(err.splitlines())) == (2, "", 1) and told in err, err
