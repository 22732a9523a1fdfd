"""What lenses have seen, in a file: every lens, several of them, files that are something else."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import regard
from regard.errors import RegardError
from regard.lens import LENSES, Entropy
from regard.runtime import Lens, load_seen
from regard.runtime.site import Site
from regard.runtime.store import FORMAT, save_seen
from tests.lens.dense import assert_same
from tests.support.families import FAMILIES
from tests.support.stages import run


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"].build("sdpa")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "seen.safetensors"


def options():
    """For every lens, options that are not the default, of those that it has."""
    given = {"previous-token": {"offset": 2}, "sinks": {"position": 1}, "entropy": {"before": True}}
    return {name: given.get(name, {}) for name in sorted(LENSES) if name != "image-maps"}


def test_all_lenses_in_one_file(llama, path):
    lenses = [LENSES[name](name=name, **given) for name, given in options().items()]
    with regard.watch(llama, *lenses) as seen:
        run(llama)
    seen.save(str(path))
    found = load_seen(path)
    assert list(found) == list(options())
    for name, lens in found.items():
        assert type(lens) is LENSES[name]
        assert_same(lens.result(), seen[name])
        for option, value in options()[name].items():
            assert getattr(lens, option) == value


def test_files_of_halves_merge_to_the_whole(llama, tmp_path):
    inputs = FAMILIES["llama"].inputs(llama)["input_ids"]
    parts = {"whole": inputs, "first": inputs[:1], "second": inputs[1:]}
    for name, ids in parts.items():
        with torch.no_grad(), regard.watch(llama, Entropy()) as seen:
            llama(ids)
        seen.save(str(tmp_path / name))
    first, second, whole = (load_seen(tmp_path / n)["Entropy"] for n in ("first", "second", "whole"))
    first.merge(second)
    assert_same(first.result(), whole.result())


class Noted(Lens):
    """Keeps some of everything that a tally can hold."""

    def note(self, *values):
        site = Site("a.b", "text.0", "text", 0, None)
        for value in values:
            self.tally.append(site, "kept", value)
        self.tally.mean(site, "mean", torch.tensor([1.0, 5.0]), 2)
        self.tally.largest(site, "most", torch.tensor(3.0))
        return self

    def result(self):
        return {name: self.tally.get(name)["text.0"] for name in ("kept", "mean", "most")}


def test_lists_means_and_extremes_come_back(path):
    lens = Noted().note(1, torch.arange(3), "x", None, [1, 2], torch.zeros(0))
    save_seen(path, {"a": lens}, {})
    found = load_seen(path)["a"].result()
    assert [str(x) for x in found["kept"]] == [str(x) for x in lens.result()["kept"]]
    assert found["mean"].tolist() == [0.5, 2.5]
    assert found["most"].item() == 3.0


def test_a_lens_of_the_users_own_comes_back_where_its_class_is_loaded(path):
    save_seen(path, {"mine": Noted(name="mine", before=True).note(1)}, {})
    found = load_seen(path)["mine"]
    assert (type(found), found.name, found.before) == (Noted, "mine", True)


def test_names_may_hold_anything(path):
    names = ["a", "a|b", "a|b|c", "ä ö/0", ""]
    save_seen(path, {name: Noted(name=name).note(i) for i, name in enumerate(names)}, {})
    found = load_seen(path)
    assert {name: lens.result()["kept"] for name, lens in found.items()} == {
        n: [i] for i, n in enumerate(names)
    }


def test_tensors_may_share_memory(path):
    x = torch.arange(6.0)
    save_seen(path, {"a": Noted().note(x[:3], x[3:], x.view(2, 3).T, x)}, {})
    kept = load_seen(path)["a"].result()["kept"]
    assert [t.tolist() for t in kept] == [[0, 1, 2], [3, 4, 5], [[0, 3], [1, 4], [2, 5]], list(range(6))]


def test_no_lens_and_a_lens_that_saw_nothing(path):
    save_seen(path, {}, {"model": "x"})
    assert load_seen(path) == {}
    save_seen(path, {"a": Entropy()}, {})
    assert not load_seen(path)["a"].tally


def rewritten(path, **changes):
    """Write the file again with other metadata."""
    with safe_open(path, "pt") as file:
        header = {**file.metadata(), **changes}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, path, {key: value for key, value in header.items() if value is not None})


def entry(**changes):
    tally = {"aliases": {}, "lists": {}}
    usual = {"name": "a", "class": "regard.lens.entropy:Entropy", "options": {}, "tally": tally, "tensors": 0}
    return json.dumps([{**usual, **changes}])


BROKEN = {
    "another format": ({"format": "other-1"}, "not written by regard.*'other-1'"),
    "no format": ({"format": None}, "not written by regard"),
    "no lenses": ({"lenses": None}, "damaged"),
    "no json": ({"lenses": "{"}, "damaged"),
    "another json": ({"lenses": "[3]"}, "damaged"),
    "no such class": ({"lenses": entry(**{"class": "regard.lens:Nothing"})}, "regard.lens:Nothing.*no lens"),
    "no such module": (
        {"lenses": entry(**{"class": "regard.lens.gone:Gone"})},
        "regard.lens.gone:Gone.*no lens",
    ),
    "no lens": ({"lenses": entry(**{"class": "regard.errors:RegardError"})}, "RegardError.*no lens"),
    "any module": ({"lenses": entry(**{"class": "antigravity:fly"})}, "antigravity:fly.*no lens"),
    "another option": ({"lenses": entry(options={"no_such": 1})}, "Entropy.*no_such"),
    "another tally": ({"lenses": entry(tally={})}, "damaged"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_files_that_do_not_fit_are_refused(path, case):
    changes, message = BROKEN[case]
    save_seen(path, {"a": Entropy()}, {})
    rewritten(path, **changes)
    with pytest.raises(RegardError, match=message):
        load_seen(path)


def test_files_that_are_cut_short_or_nothing_at_all(llama, path, tmp_path):
    with regard.watch(llama, Entropy()) as seen:
        run(llama)
    seen.save(str(path))
    whole = path.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(RegardError, match="not a safetensors file"):
            load_seen(path)
    with pytest.raises(RegardError, match="no file"):
        load_seen(tmp_path / "gone")
    with pytest.raises(RegardError, match="no file"):
        load_seen(tmp_path)


def test_a_missing_tensor_is_reported(path):
    save_seen(path, {"a": Noted().note(torch.ones(2))}, {})
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file({"empty": torch.zeros(1)}, path, header)
    with pytest.raises(RegardError, match="damaged"):
        load_seen(path)


def test_a_failed_write_leaves_what_was_there(path, monkeypatch, tmp_path):
    save_seen(path, {"a": Noted().note(1)}, {})
    before = path.read_bytes()

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("regard.runtime.store.os.replace", fail)
    with pytest.raises(RegardError, match="Cannot write.*No space left"):
        save_seen(path, {"a": Noted().note(2)}, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(RegardError, match="Cannot write"):
        save_seen(tmp_path / "gone" / "file", {"a": Entropy()}, {})


def test_what_it_was_of_is_written_beside(llama, path):
    with regard.watch(llama, Entropy()) as seen:
        run(llama)
    seen.save(str(path))
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert header["format"] == FORMAT
    assert json.loads(header["about"]) == {"model": "LlamaForCausalLM"}
