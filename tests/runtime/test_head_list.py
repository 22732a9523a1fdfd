"""Lists of heads: their order, controls, files, and the model they are refused for."""

import numpy as np
import pytest

import regard
from regard.edit import ForceAttention, ScaleHeads
from regard.errors import RegardError
from regard.runtime.head_list import HeadList
from regard.runtime.head_table import HeadTable
from regard.runtime.model_identity import identify
from tests.support.families import FAMILIES


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"].build("sdpa")


def listed(model, count=3, **about):
    """A list over all heads of a tiny model, whose score is (4 * layer + head) modulo 5."""
    sites = [site for site in regard.watch(model).sites if site.kind == "text"]
    names = [(site.alias, head) for site in sites for head in range(site.heads)]
    score = np.array([(4 * int(site.rpartition(".")[2]) + head) % 5 for site, head in names], dtype=float)
    columns = {"score": score, "first": score, "second": -score}
    heads = np.array([head for _, head in names])
    made = {"model": identify(model, "tiny"), "kind": "retrieval", **about}
    return HeadList(HeadTable(tuple(s for s, _ in names), heads, columns, made), count)


def test_it_is_a_sequence_best_first(llama):
    heads = listed(llama)
    assert list(heads) == [("text.1", 0), ("text.0", 3), ("text.0", 2)] == heads[:3]
    assert len(heads) == 3 and heads[0] in heads and list(heads.top(1)) == [("text.1", 0)]
    assert heads.correlation == -1.0 and heads.shared.shared < 3
    assert repr(heads).startswith("HeadList(3 of 8 heads: text.1 0")


def test_controls_are_as_many_and_never_lead(llama):
    heads = listed(llama)
    drawn = [heads.control(seed) for seed in range(20)]
    assert all(len(set(d)) == 3 and not set(d) & set(heads) for d in drawn)
    assert len({tuple(d) for d in drawn}) > 1 and heads.control(4) == heads.control(4)
    assert not set(heads.top(1).control(1, outside=5)) & set(heads.top(5))
    with pytest.raises(RegardError, match="5 control heads are needed, and 8"):
        listed(llama, 5).control()


def test_a_file_keeps_everything(llama, tmp_path):
    path = tmp_path / "heads.json"
    heads = listed(llama, chance=0.01)
    heads.save(path)
    read = HeadList.load(path)
    assert list(read) == list(heads) and read.about == heads.about
    HeadTable.load(path).save(tmp_path / "same.json")
    heads.table.save(path)
    with pytest.raises(RegardError, match="holds a table of heads and no list"):
        HeadList.load(path)


def test_steering_takes_a_list_as_it_was_saved(llama, tmp_path):
    inputs = FAMILIES["llama"].inputs(llama)
    heads = listed(llama)
    heads.save(tmp_path / "heads.json")
    found = []
    for given in (heads, HeadList.load(tmp_path / "heads.json"), list(heads)):
        with regard.steer(llama, ScaleHeads(heads=given)):
            found.append(llama(**inputs).logits)
    assert all(found[0].equal(other) for other in found[1:])
    assert not found[0].allclose(llama(**inputs).logits, atol=1e-3)
    with regard.steer(llama, ForceAttention(heads, to="first")):
        llama(**inputs)


@pytest.mark.parametrize("edit", [ScaleHeads, ForceAttention])
def test_another_model_refuses_it(llama, edit):
    options = {"to": "first"} if edit is ForceAttention else {}
    made = edit(heads=listed(llama), **options)
    regard.steer(FAMILIES["llama"].build("eager", seed=3), made)
    for other in ("mistral", "gpt2", "bert"):
        with pytest.raises(
            RegardError, match=r"this list of retrieval heads was made for tiny \(LlamaForCausalLM"
        ):
            regard.steer(FAMILIES[other].build(), made)


def test_a_config_of_another_size_is_another_model(llama):
    wider = FAMILIES["llama"].build("sdpa")
    wider.config.rope_parameters = {**(wider.config.rope_parameters or {}), "rope_theta": 77.0}
    assert identify(wider) != identify(llama)
    with pytest.raises(RegardError, match=r"config [0-9a-f]{6}\), and this model is"):
        listed(llama).check(regard.watch(wider).anatomy)


def test_half_precision_and_names_do_not_make_another(llama):
    twin = FAMILIES["llama"].build("eager").bfloat16()
    twin.config._name_or_path = "elsewhere"
    assert {**identify(twin), "name": ""} == {**identify(llama), "name": ""}


def test_what_is_no_list_is_refused(llama):
    table = listed(llama).table
    with pytest.raises(RegardError, match="has a column `score`"):
        HeadList(HeadTable(table.sites, table.heads, {"other": table["score"]}, table.about))
    with pytest.raises(RegardError, match="9 heads were asked for, and 8 have a score"):
        listed(llama, 9)
