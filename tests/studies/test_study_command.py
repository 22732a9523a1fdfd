"""`regard study` on the command line: what is printed, written and refused."""

import pytest

from regard.cli import main
from regard.studies import STUDIES, outcomes_in
from regard.studies.table import page


def test_a_study_is_run_and_told(dice, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["study", "dice"]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    lines = told.out.splitlines()
    assert lines[0] == "dice: holds"
    assert "✓ A loaded die shows more." in told.out and "✗ It shows twice as much." in told.out
    assert "loaded − fair > 0.5 points; measured " in told.out
    assert lines[-1] == "wrote regard-studies/dice.json and dice.png"
    assert (tmp_path / "regard-studies" / "dice.json").exists()


def test_without_a_name_the_studies_are_listed_with_their_outcomes(dice, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["study", "dice", "--quick"])
    capsys.readouterr()
    assert main(["study"]) == 0
    told = capsys.readouterr().out
    assert "dice" in told and "A. Uthor 2024" in told and "not run" in told
    main(["study", "dice"])
    capsys.readouterr()
    assert main(["study", "--out", "regard-studies"]) == 0
    assert "holds (1 of 2 claims hold)" in capsys.readouterr().out


def only(monkeypatch, kinds):
    monkeypatch.setattr("regard.studies.all_studies", lambda: kinds)


def test_all_goes_on_after_a_failure_and_tells_it(dice, tmp_path, capsys, monkeypatch):
    def fail(self):
        raise OSError("no dice left")

    broken = type("Broken", (dice,), {"slug": "a-broken-die", "prepare": fail})
    monkeypatch.setitem(STUDIES, "a-broken-die", broken)
    only(monkeypatch, {"a-broken-die": broken, "dice": dice})
    assert main(["study", "--all", "--quick", "--out", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert "1 of 2 studies ran; these failed: a-broken-die." in told.out
    assert "a-broken-die failed" in told.err and "OSError: no dice left" in told.err
    assert (tmp_path / "dice.quick.json").exists()
    assert not (tmp_path / "a-broken-die.quick.json").exists()


def test_all_that_run_give_exit_code_zero(dice, tmp_path, capsys, monkeypatch):
    only(monkeypatch, {"dice": dice})
    assert main(["study", "--all", "--quick", "--out", str(tmp_path)]) == 0
    assert "1 of 1 studies ran." in capsys.readouterr().out


def test_an_interrupted_study_says_how_to_go_on(dice, tmp_path, capsys, monkeypatch):
    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(dice, "prepare", stop)
    assert main(["study", "dice", "--out", str(tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dise"], "no study 'dise'; did you mean dice"),
        (["dice", "dise"], "no study 'dise'"),
        (["dice", "--all"], "give it or names, not both"),
        (["dice", "--seed", "-1"], "it must be a whole number from 0"),
        (["dice", "--seed", "x"], "invalid int value"),
        (["dice", "--out", "file"], "file cannot be written to"),
        (["--out", "nowhere"], "there is no folder nowhere"),
        (["--table", "nowhere"], "there is no folder nowhere"),
        (["--table", "."], "holds no outcome of a full study"),
        (["dice", "--table", "."], "--table runs nothing"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_sentence(dice, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(["study", *words]) == 2
    told = capsys.readouterr()
    assert message in told.err and told.err.count("\n") == 1 and told.out == ""
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and dice.ran == []


def test_outcomes_are_tabulated(dice, tmp_path, capsys):
    main(["study", "dice", "--out", str(tmp_path)])
    main(["study", "dice", "--quick", "--out", str(tmp_path)])
    (tmp_path / "other.json").write_text('{"benchmark": 1}')
    assert main(["study", "--table", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text("utf-8")
    assert text == page(outcomes_in(tmp_path), tmp_path)
    assert "| [dice](#dice) | A. Uthor 2024, arXiv 2401.00001 | ✓ holds | 1 of 2 claims hold |" in text
    assert "![What dice measured](dice.png)" in text and "quick" not in text
    assert "| **A loaded die shows more.** | ✓ holds | `loaded − fair > 0.5 points` |" in text
    assert "| 1.2 points |" in text and "`regard study dice --seed 0`" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"study": "dice"', "dice.json is no outcome of a study"),
        ('{"study": "dice"}', "dice.json is no outcome of a study"),
        (None, "other.json holds the outcome of dice"),
    ],
)
def test_a_damaged_outcome_is_named(dice, tmp_path, capsys, content, message):
    main(["study", "dice", "--out", str(tmp_path)])
    path = tmp_path / "dice.json"
    path.write_text(content) if content else path.rename(tmp_path / "other.json")
    capsys.readouterr()
    assert main(["study", "--table", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "README.md").exists()
