"""Running a study: what is written, what is used again, what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import regard.studies.picture
from regard.errors import RegardError
from regard.studies import Step, all_studies, find_study, read_outcome, run, study
from regard.studies.keep import own_code
from tests.studies import toy

ROOT = Path(__file__).resolve().parents[2]


def lasting(outcome):
    """What two runs of one study share: everything but times."""
    return {k: v for k, v in json.loads(outcome.to_json()).items() if k not in ("seconds", "steps")}


def test_a_study_writes_an_outcome_and_a_picture(dice, tmp_path):
    outcome = run("dice", out=tmp_path, seed=3)
    assert [c["verdict"] for c in outcome.claims] == ["holds", "does not hold here"]
    assert outcome.verdict == "holds" and outcome.rules_first and not outcome.quick
    assert read_outcome(tmp_path / "dice.json") == outcome
    assert (tmp_path / "dice.png").read_bytes().startswith(b"\x89PNG")
    told = json.loads((tmp_path / "dice.json").read_text("utf-8"))
    assert told["study"] == "dice" and told["command"] == "regard study dice --seed 3"
    assert told["claims"][0]["rules"][0]["text"] == "loaded − fair > 0.5 points"
    assert told["claims"][0]["paper"] == "1.2 points"
    assert len(told["measures"]["loaded"]["values"]) == 6
    assert {"processor", "cores", "threads"} <= set(told["machine"]) and "torch" in told["versions"]
    assert len(told["steps"]) == 6 and told["seconds"] >= 0
    assert list(tmp_path.glob(".*")) == []


def test_without_a_folder_nothing_is_written(dice, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("dice", quick=True).verdict
    assert list(tmp_path.iterdir()) == []


def test_a_quick_outcome_is_marked_and_never_replaces_a_full_one(dice, tmp_path):
    run("dice", out=tmp_path)
    full = (tmp_path / "dice.json").read_bytes(), (tmp_path / "dice.png").read_bytes()
    quick = run("dice", quick=True, out=tmp_path)
    assert quick.quick and "quick run" in str(quick) and quick.command.endswith("--quick")
    assert ((tmp_path / "dice.json").read_bytes(), (tmp_path / "dice.png").read_bytes()) == full
    assert read_outcome(tmp_path / "dice.quick.json").size == {"dice": 3, "throws": 50}


def test_finished_steps_are_not_run_again(dice, tmp_path):
    first = run("dice", out=tmp_path)
    assert len(dice.ran) == 6
    assert lasting(run("dice", out=tmp_path)) == lasting(first)
    assert len(dice.ran) == 6
    assert lasting(run("dice", out=tmp_path, resume=False)) == lasting(first)
    assert len(dice.ran) == 12


def test_a_run_that_was_stopped_goes_on(dice, tmp_path, monkeypatch):
    def stop(self, number):
        if number == 5:
            raise KeyboardInterrupt
        return toy.Dice.throw(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(dice, "throw", stop)
        with pytest.raises(KeyboardInterrupt):
            run("dice", out=tmp_path)
    assert not (tmp_path / "dice.json").exists() and not (tmp_path / "dice.png").exists()
    assert dice.ran == [0, 1, 2, 3, 4]
    outcome = run("dice", out=tmp_path)
    assert dice.ran == list(range(6))
    assert lasting(outcome) == lasting(run("dice", out=tmp_path / "whole"))


@pytest.mark.parametrize("change", ["seed", "size", "code", "versions", "damaged", "torn"])
def test_a_step_is_run_again_where_something_changed(dice, tmp_path, monkeypatch, change):
    run("dice", out=tmp_path)
    before, seed = len(dice.ran), 0
    again = 6
    path = tmp_path / "dice.steps" / "die-0.json"
    if change == "seed":
        seed = 1
    elif change == "size":
        monkeypatch.setattr(dice, "full", toy.Size(throws=201))
    elif change == "code":
        monkeypatch.setattr("regard.studies.running.code_of", lambda kind: "other")
    elif change == "versions":
        told = {**regard.studies.running.versions(), "torch": "0"}
        monkeypatch.setattr("regard.studies.running.versions", lambda: told)
    else:
        path.write_text("[]" if change == "damaged" else path.read_text()[:20])
        again = 1
    run("dice", out=tmp_path, seed=seed)
    assert len(dice.ran) - before == again


def test_rules_changed_after_the_first_step_are_told(dice, tmp_path, monkeypatch):
    run("dice", out=tmp_path)
    monkeypatch.setattr(dice, "claims", dice.claims[:1])
    changed = run("dice", out=tmp_path)
    assert not changed.rules_first and "rules were changed" in str(changed)
    assert run("dice", out=tmp_path, resume=False).rules_first


KILLED = """
import os, signal
from tests.studies import toy
from regard.studies import run, study

@study("dice")
class Dice(toy.Dice):
    def throw(self, number):
        if number == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().throw(number)

run("dice", out={out!r})
"""


def test_a_killed_run_leaves_nothing_half_written(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(out=str(tmp_path / "out")))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], cwd=ROOT, env=environment, check=False)
    assert done.returncode == -9
    left = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*"))
    assert left == ["dice.steps", *(f"dice.steps/die-{n}.json" for n in range(4)), "dice.steps/rules.json"]
    assert all(json.loads(p.read_text()) for p in (tmp_path / "out").rglob("*.json"))


def test_steps_do_not_depend_on_those_before(dice, tmp_path, monkeypatch):
    import torch

    def throw(self, number):
        return {"fair": 1 + torch.rand(()).item(), "loaded": 3.0}

    monkeypatch.setattr(dice, "throw", throw)
    whole = run("dice", out=tmp_path)
    (tmp_path / "dice.steps" / "die-3.json").unlink()
    assert run("dice", out=tmp_path).measures == whole.measures
    assert len(set(whole.measures["fair"]["values"])) == 6


def test_the_callers_random_state_is_left_alone(dice):
    import torch

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run("dice", quick=True)
    assert torch.equal(torch.rand(3), expected)


def test_without_matplotlib_there_is_no_picture(dice, tmp_path, monkeypatch):
    run("dice", out=tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run("dice", out=tmp_path).verdict == "holds"
    assert not (tmp_path / "dice.png").exists() and (tmp_path / "dice.json").exists()


def test_without_scipy_no_study_starts(dice, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(RegardError, match=r'pip install "regard\[study\]"'):
        run("dice", out=tmp_path / "out")
    assert dice.ran == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", [-1, 1.5, True, "0", 2**31])
def test_a_seed_that_is_none_is_refused(dice, seed):
    with pytest.raises(RegardError, match="it must be a whole number from 0"):
        run("dice", seed=seed)
    assert dice.ran == []


def test_a_folder_that_cannot_be_written_to_is_refused(dice, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RegardError, match="cannot be written to"):
            run("dice", out=out)
    assert dice.ran == []


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "no steps"),
        ([Step("a b", int), Step("A, b", int)], "'A, b' needs a name of its own; 'a b' has it"),
        ([Step("rules", int)], "needs a name of its own"),
        ([Step("x", lambda: {1, 2})], "step 'x' must return plain numbers"),
        ([Step("x", lambda: __import__("torch").ones(2))], "must return plain numbers"),
    ],
)
def test_steps_that_cannot_be_kept_are_refused(dice, monkeypatch, steps, message):
    monkeypatch.setattr(dice, "steps", lambda self: steps)
    with pytest.raises(RegardError, match=message):
        run("dice")


def test_an_unknown_study_is_answered_with_the_nearest(dice):
    with pytest.raises(RegardError, match="no study 'dise'; did you mean dice"):
        run("dise")
    with pytest.raises(RegardError, match=r"the studies are .*dice"):
        find_study("qqqqqq")


def test_a_name_is_taken_once(dice):
    with pytest.raises(RegardError, match="registered already, as Dice"):
        study("dice")(toy.Dice)


def test_a_study_whose_rule_decides_nothing_is_not_registered(dice):
    import dataclasses

    rule = dataclasses.replace(toy.Dice.claims[0].rules[0], threshold=-6)
    claims = (dataclasses.replace(toy.Dice.claims[0], rules=(rule,)),)
    with pytest.raises(RegardError, match="study 'empty': claim 'more': .* never fails"):
        study("empty")(type("Empty", (toy.Dice,), {"claims": claims}))
    assert "empty" not in all_studies()


def test_a_study_without_a_part_is_not_registered(dice):
    part = {name: getattr(toy.Dice, name) for name in ("title", "paper", "quantities", "claims", "full")}
    with pytest.raises(RegardError, match="study 'half' has no quick, steps, measure, draw"):
        study("half")(type("Half", (regard.studies.Study,), part))


SOURCE = '''
class Dice(Study):
    """Words."""
    title = "a"
    claims: tuple = ()

    def steps(self):
        return 1  # a remark

    def draw(self, outcome, figure):
        pass
'''


def test_what_comes_after_the_steps_does_not_count_as_their_code():
    code = own_code(SOURCE, "Dice")
    assert own_code(SOURCE.replace("  # a remark", "").replace('title = "a"', 'title = "b"'), "Dice") == code
    assert own_code(SOURCE.replace("pass", "figure.clear()").replace("()\n", "(1,)\n"), "Dice") == code
    assert own_code(SOURCE.replace("return 1", "return 2"), "Dice") != code
    assert own_code(SOURCE, "Other") != code


def test_listing_the_studies_loads_nothing_heavy():
    script = (
        "import sys; from regard.studies import all_studies; all_studies(); "
        "print([n for n in ('torch', 'transformers', 'scipy', 'matplotlib') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
