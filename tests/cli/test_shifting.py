"""`regard run representation-shift`: files that lead from one action to the next, on a tiny model."""

import json

import pytest

from regard.cli import main
from tests.support.characters import characters
from tests.support.families import FAMILIES


@pytest.fixture
def run(capsys):
    """Run the command; returns (exit code, standard output, standard error)."""

    def run(*words):
        code = main(["run", "representation-shift", *map(str, words)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model on disk, and pairs for it."""
    place = tmp_path_factory.mktemp("tiny")
    FAMILIES["llama"].build().save_pretrained(place)
    characters().save_pretrained(place)
    letters = "abcdefgh"
    pairs = [f"{a}{b}\t{b}X" for a in letters for b in letters[:3]]
    (place / "pairs.txt").write_text("\n".join(pairs) + "\n")
    return place


def test_one_action_leads_to_the_next(run, folder, tmp_path):
    model, pairs = ("--model", folder), ("--pairs", folder / "pairs.txt")
    code, out, err = run(
        "tune", *model, *pairs, "--out", tmp_path / "tuned", "--steps", 3, "--layers", "1", "--rate", 0.05
    )
    assert code == 0, err
    assert "24 pairs, blocks 1 to 1" in out and (tmp_path / "tuned" / "adapter_config.json").is_file()
    states = [tmp_path / name for name in ("before", "after")]
    for path, more in zip(states, ((), ("--adapter", tmp_path / "tuned")), strict=True):
        code, out, err = run(
            "collect", *model, *pairs, "--token", "X", "--layers", "0,1", "--out", path, *more
        )
        assert code == 0 and "24 of 24 prompts, layers 0, 1" in out, err
    code, out, err = run("concepts", states[0], *model, "--count", 3, "--out", tmp_path / "c", "--json", "-")
    assert code == 0, err
    told = json.loads(out)
    assert sum(told["counts"]) == 24 and told["layer"] == 1 and (tmp_path / "c").is_file()
    code, out, err = run("shift", *states, *model, "--count", 3, "--json", "-")
    assert code == 0, err
    told = json.loads(out)
    assert len(told["concepts"]) == 3 and told["recovery"]["shifted"] > told["recovery"]["unshifted"]
    code, out, _ = run("shift", *states, *model, "--count", 3)
    assert "Share of the shift explained" in out and "makes likelier" in out
    code, out, err = run(
        "steer", states[1], states[0], *model, "--prompt", "ab", "--out", tmp_path / "edit.json"
    )
    assert code == 0 and "steered" in out and "random, as long" in out, err
    code, out, err = run(
        "steer",
        *states,
        *model,
        "--prompt",
        "ab",
        "--concept",
        1,
        "--count",
        3,
        "--scope",
        "last",
        "--json",
        "-",
    )
    assert code == 0 and json.loads(out)["norm"] > 0, err
    words = ["diff", str(folder), "--edits", str(tmp_path / "edit.json"), "--text", "abcdef", "--no-report"]
    assert main(words) == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("shift", "a"), "shift takes 2 files of states, and got 1"),
        (("collect",), "name where with --out"),
        (("concepts", "none", "--out", "x"), "none cannot be read"),
        (("tune", "--out", "there/is/none"), "there is no folder"),
        (("tune", "--out", "x", "--pairs", "nothing.txt"), "nothing.txt cannot be read"),
        (("tune", "--out", "x", "--steps", "0"), "steps is 0"),
        (("collect", "--out", "x", "--adapter", "nowhere"), "has no adapter_config.json"),
    ],
)
def test_bad_input_is_one_sentence(run, folder, tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*words, "--model", folder)
    assert code == 2 and told in err and "Traceback" not in err
    assert not (tmp_path / "x").exists()


def test_pairs_without_a_tab_are_named(run, folder, tmp_path):
    (tmp_path / "p.txt").write_text("a\tb\nc d\n")
    code, _, err = run("tune", "--model", folder, "--out", tmp_path / "x", "--pairs", tmp_path / "p.txt")
    assert code == 2 and "line 2 of" in err
