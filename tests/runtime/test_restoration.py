"""After a session, however it ended, the model and everything around it are as they were."""

import gc
import weakref

import pytest
import torch

import regard
from regard.errors import NoSuchSite, NothingObserved, UnsupportedModel
from regard.runtime import Edit, Lens, Point
from tests.support.families import FAMILIES
from tests.support.stages import Failing, Misplaced, Rows, Sharper, failing, run, state

KINDS = ["llama", "falcon", "bart", "llava", "vit"]


@pytest.fixture
def llama():
    return FAMILIES["llama"].build("sdpa")


@pytest.mark.parametrize("name", KINDS)
def test_after_a_session(name):
    model = FAMILIES[name].build("sdpa")
    expected, before = run(model, name), state(model)
    with regard.steer(model, Sharper(), Rows()):
        during = run(model, name)
        assert state(model) != before
    assert state(model) == before
    assert torch.equal(run(model, name), expected)
    assert not torch.allclose(during, expected, atol=1e-3)


@pytest.mark.parametrize("method", ["prepare", "inputs", "scores", "weights", "head_outputs", "end_call"])
@pytest.mark.parametrize("base", [Lens, Edit])
@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_after_a_failing_stage(name, base, method):
    model = FAMILIES[name].build("sdpa")
    expected, before = run(model, name), state(model)
    with pytest.raises(Failing, match=method), regard.steer(model, failing(base, method), Rows()):
        run(model, name)
    assert state(model) == before
    assert torch.equal(run(model, name), expected)


@pytest.mark.parametrize("method", ["attend", "survey", "step", "hidden"])
def test_after_a_failing_edit(llama, method):
    edit = failing(Edit, method)
    if method == "hidden":
        type(edit).points = lambda self, anatomy: [Point("mlp", 1)]
    if method == "survey":
        type(edit).weights = lambda self, block: None
    before = state(llama)
    with pytest.raises(Failing), regard.steer(llama, edit):
        llama.generate(**FAMILIES["llama"].inputs(llama), max_new_tokens=2, do_sample=False)
    assert state(llama) == before


@pytest.mark.parametrize("name", ["llama", "falcon", "bart"])
def test_after_a_failure_inside_forward(name, monkeypatch):
    model = FAMILIES[name].build("sdpa")
    module = model.get_output_embeddings()

    def fail(*args):
        raise Failing

    before = state(model)
    handle = module.register_forward_pre_hook(fail)
    with pytest.raises(Failing), regard.watch(model, Rows()):
        run(model, name)
    handle.remove()
    assert state(model) == before


def test_a_session_goes_on_after_a_failed_forward(llama):
    with regard.watch(llama, Rows()) as seen:
        with pytest.raises(IndexError):
            llama(input_ids=torch.tensor([[10**6]]))
        run(llama)
    assert seen[Rows] == {"text.0": 1, "text.1": 1}


def test_after_a_failing_generate(llama):
    before = state(llama)
    with pytest.raises(ValueError, match="model_kwargs"), regard.watch(llama, Rows()):
        llama.generate(input_ids=torch.tensor([[5, 6]]), no_such_option=1)
    with pytest.raises(Failing), regard.watch(llama, Rows()):
        llama.generate(input_ids=torch.tensor([[5, 6]]), stopping_criteria=[lambda *a, **k: fail_now()])
    assert state(llama) == before


def fail_now():
    raise Failing


def test_after_an_exception_in_the_block(llama):
    before = state(llama)
    with pytest.raises(Failing), regard.watch(llama, Rows()):
        raise Failing
    assert state(llama) == before


def test_after_nothing_was_observed(llama):
    before = state(llama)
    with pytest.raises(NothingObserved), regard.watch(llama, Rows()):
        pass
    assert state(llama) == before


def test_after_failing_to_enter(llama):
    before = state(llama)
    with pytest.raises(NoSuchSite, match="99"), regard.watch(llama, Misplaced()):
        pass
    assert state(llama) == before
    llama.model.layers[1].compile(backend="eager")
    before = state(llama)
    with pytest.raises(UnsupportedModel, match="compiled"), regard.watch(llama, Rows()):
        pass
    assert state(llama) == before


def test_a_model_is_freed_after_its_session():
    model = FAMILIES["llama"].build("sdpa")
    with regard.steer(model, Sharper(), Rows()) as seen:
        run(model)
    gone = weakref.ref(model)
    del model, seen
    gc.collect()
    assert gone() is None
