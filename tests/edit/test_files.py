"""Edits on disk: they come back as they were, for their own model only."""

import json

import pytest
import torch

import regard
from regard.cli import main
from regard.edit import ACT, EditWeights, ScaleHeads, ScoreBias
from regard.errors import NoSuchSite, RegardError
from regard.runtime import Edit
from tests.edit.plain import close, logits
from tests.support import folders
from tests.support.families import FAMILIES

EDITS = [
    ACT([(0, 1), (1, 2)], alpha=1.3, beta=0.2),
    ScaleHeads({(0, 0): 0.5, ("text.1", 3): 0.0}),
    ScaleHeads(heads=[(1, 1)], factor=torch.tensor(0.25)),
    ScoreBias({0: torch.tensor([0.5, -1.0]), 1: 0.25}, positions=[0, 3]),
]


@pytest.fixture(scope="module")
def model():
    return FAMILIES["llama"].build()


@pytest.mark.parametrize("number", range(len(EDITS)))
def test_an_edit_comes_back_as_it_was(model, tmp_path, number):
    edit = EDITS[number] if number != 3 else ScoreBias({0: torch.rand(4, 2), 1: 0.25}, positions=[0, 3])
    inputs = FAMILIES["llama"].inputs(model)
    regard.save_edits(tmp_path / "a.json", model, edit)
    (again,) = regard.load_edits(tmp_path / "a.json", model)
    assert type(again) is type(edit)
    with regard.steer(model, edit):
        expected = logits(model, inputs)
    with regard.steer(model, again):
        assert torch.equal(logits(model, inputs), expected)
    assert not close(expected, logits(model, inputs))


def test_several_edits_keep_their_order_and_defaults_are_left_out(model, tmp_path):
    regard.save_edits(tmp_path / "a.json", model, EDITS[0], EDITS[1])
    told = json.loads((tmp_path / "a.json").read_text())
    assert [each["name"] for each in told["edits"]] == ["act", "scale-heads"]
    assert set(told["edits"][0]["options"]) == {"heads", "alpha", "beta"}
    assert [type(edit) for edit in regard.load_edits(tmp_path / "a.json", model)] == [ACT, ScaleHeads]


def test_another_model_is_refused(model, tmp_path):
    regard.save_edits(tmp_path / "a.json", model, EDITS[0])
    with pytest.raises(RegardError, match=r"a\.json was made for .*LlamaForCausalLM, 2 layers"):
        regard.load_edits(tmp_path / "a.json", FAMILIES["gpt2"].build())


class Own(Edit):
    """One that is not registered."""


def test_what_cannot_be_written_is_refused_and_nothing_is_left(model, tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(RegardError, match="edit-weights fn is a function"):
        regard.save_edits(path, model, EditWeights(lambda weights, block: weights))
    with pytest.raises(RegardError, match="Own is not registered"):
        regard.save_edits(path, model, Own())
    with pytest.raises(RegardError, match="no edits to save"):
        regard.save_edits(path, model)
    with pytest.raises(NoSuchSite, match="no head 9"):
        regard.save_edits(path, model, ACT([(0, 9)]))
    assert not path.exists()


def test_files_that_hold_no_edits(model, tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(RegardError, match="cannot read"):
        regard.load_edits(path, model)
    path.write_text("{}")
    with pytest.raises(RegardError, match="holds no edits that regard saved"):
        regard.load_edits(path, model)
    regard.save_edits(path, model, EDITS[0])
    told = json.loads(path.read_text())
    told["edits"][0]["options"]["gamma"] = 1
    path.write_text(json.dumps(told))
    with pytest.raises(RegardError, match="option 'gamma'"):
        regard.load_edits(path, model)


def test_diff_takes_a_file_of_edits(tmp_path, capsys):
    folder = folders.llama(tmp_path / "llama")
    loaded, _ = regard.load(folder)
    regard.save_edits(tmp_path / "a.json", loaded, ScaleHeads(heads=[(0, 1), (1, 2)]))
    words = ["diff", folder, "--text", folders.TEXT, "--no-report", "--edits", tmp_path / "a.json"]
    assert main(list(map(str, words))) == 0
    assert "a.json" in capsys.readouterr().out
    other = folders.llama(tmp_path / "other", num_hidden_layers=3)
    words[1] = other
    assert main(list(map(str, words))) == 2
    assert "was made for" in capsys.readouterr().err
