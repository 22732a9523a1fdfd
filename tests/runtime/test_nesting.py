"""Sessions inside and beside one another, opened again, and what they say where little happened."""

import pytest
import torch
from transformers import LlamaForCausalLM

import regard
from regard.errors import NoSuchSite, NothingObserved, RegardError
from regard.runtime import Lens, Point
from regard.runtime.edits import ScaleHeads
from tests.support.families import FAMILIES
from tests.support.stages import Misplaced, Rows, Sharper, run, state


@pytest.fixture
def llama():
    return FAMILIES["llama"].build("sdpa")


def test_failing_to_enter_leaves_the_outer_session_whole(llama):
    alone = FAMILIES["llama"].build("sdpa")
    with regard.steer(alone, Sharper()):
        expected = run(alone)
    lens = Hidden()
    with regard.steer(llama, Sharper(), lens) as outer:
        with pytest.raises(NoSuchSite), regard.steer(llama, Sharper(3.0), Misplaced()):
            pass
        assert torch.equal(run(llama), expected)
    assert outer[Hidden] == 1


class Hidden(Lens):
    """Counts how often it is shown the residual stream of layer 1."""

    def points(self, anatomy):
        return [Point("residual", 1)]

    def hidden(self, point, x, run):
        self.tally.append(SITE, "seen", 1)

    def result(self):
        return len(self.tally.get("seen")["text.1"])


class SITE:
    alias, kind, layer, name = "text.1", "text", 1, "model.layers.1"


def test_an_inner_session_leaves_the_outer_alive(llama):
    before, plain = state(llama), run(llama)
    with regard.steer(llama, Sharper(), Rows()) as outer:
        once = run(llama)
        with regard.steer(llama, Sharper(), Rows()) as inner:
            twice = run(llama)
        assert torch.equal(run(llama), once)
    assert outer[Rows] == {"text.0": 3, "text.1": 3}
    assert inner[Rows] == {"text.0": 1, "text.1": 1}
    assert (outer.called, inner.called) == ({"text.0": 3, "text.1": 3}, {"text.0": 1, "text.1": 1})
    assert state(llama) == before
    with regard.steer(llama, Sharper(4.0)):
        assert torch.allclose(run(llama), twice, atol=1e-5)
    assert not torch.allclose(once, twice, atol=1e-3)
    assert torch.equal(run(llama), plain)


def test_an_outer_session_may_end_first(llama):
    before = state(llama)
    outer, inner = regard.steer(llama, Sharper(2.0)), regard.steer(llama, Sharper(3.0), Rows())
    outer.__enter__()
    inner.__enter__()
    run(llama)
    outer.__exit__(None, None, None)
    left = run(llama)
    inner.__exit__(None, None, None)
    with regard.steer(llama, Sharper(3.0), Rows()):
        assert torch.equal(run(llama), left)
    assert state(llama) == before


@pytest.mark.parametrize("first", ["inner", "outer"])
def test_one_edit_in_two_sessions_applies_twice_and_then_once(llama, first):
    edit = ScaleHeads({(0, 1): 0.5})
    logits = []
    for factor in (0.25, 0.5, 1.0):
        with regard.steer(llama, ScaleHeads({(0, 1): factor})):
            logits.append(run(llama))
    sessions = {"outer": regard.steer(llama, edit), "inner": regard.steer(llama, edit)}
    for session in sessions.values():
        session.__enter__()
    torch.testing.assert_close(run(llama), logits[0])
    sessions.pop(first).__exit__(None, None, None)
    torch.testing.assert_close(run(llama), logits[1])
    next(iter(sessions.values())).__exit__(None, None, None)
    torch.testing.assert_close(run(llama), logits[2])


def test_an_inner_session_leaves_the_outer_spans(llama):
    ids = FAMILIES["llama"].inputs(llama)["input_ids"]
    spans = {name: torch.zeros_like(ids).bool() for name in ("a", "b")}
    other = {"a": torch.ones_like(ids).bool(), "c": torch.ones_like(ids).bool()}
    lens = Spanned()
    with regard.watch(llama, lens, spans=spans) as outer:
        with regard.watch(llama, spans=other):
            run(llama)
        run(llama)
    assert outer[Spanned] == [{"a": 18, "b": 0, "c": 18}, {"a": 0, "b": 0}]


class Spanned(Lens):
    """Keeps how large each span was in every forward."""

    def end_call(self, call):
        if call.site.layer == 0:
            sizes = {name: int(mask.sum()) for name, mask in call.run.spans.items()}
            self.tally.append(call.site, "spans", sizes)

    def result(self):
        return self.tally.get("spans")["text.0"]


@pytest.mark.parametrize("shared", [False, True])
def test_two_models_at_once(shared):
    first, second = FAMILIES["llama"].build("sdpa"), FAMILIES["llama"].build("sdpa", seed=1)
    if shared:
        config = first.config
        second = LlamaForCausalLM(config).eval()
    before, plain = [state(first), state(second)], [run(first), run(second)]
    one, two = regard.steer(first, Sharper(), Rows()), regard.watch(second, Rows())
    one.__enter__()
    assert torch.allclose(run(second), plain[1], atol=1e-5)
    two.__enter__()
    edited = run(first)
    assert torch.allclose(run(second), plain[1], atol=1e-5)
    one.__exit__(None, None, None)
    assert torch.allclose(run(first), plain[0], atol=1e-5)
    run(second)
    two.__exit__(None, None, None)
    assert not torch.allclose(edited, plain[0], atol=1e-3)
    assert (one[Rows], two[Rows]) == ({"text.0": 1, "text.1": 1}, {"text.0": 2, "text.1": 2})
    assert [state(first), state(second)] == before
    assert torch.equal(run(first), plain[0])
    assert torch.equal(run(second), plain[1])


def test_a_session_is_opened_once_at_a_time_and_may_be_used_again(llama):
    before = state(llama)
    with regard.watch(llama, Rows()) as seen:
        run(llama)
        with pytest.raises(RegardError, match="open already"):
            seen.__enter__()
        run(llama)
    with seen:
        run(llama)
    assert seen[Rows] == {"text.0": 3, "text.1": 3}
    assert seen.called == {"text.0": 1, "text.1": 1}
    assert state(llama) == before


def test_a_lens_object_may_be_given_to_two_sessions(llama):
    lens = Rows()
    with regard.watch(llama, lens) as first, regard.watch(llama, lens) as second:
        run(llama)
    assert not lens.tally
    assert first[Rows] == second[Rows] == {"text.0": 1, "text.1": 1}


def test_a_part_of_an_attached_model_is_refused(llama):
    before = state(llama)
    with regard.watch(llama, Rows()):
        run(llama)
        with pytest.raises(RegardError, match="attached as part of another model"), regard.watch(llama.model):
            pass
        run(llama)
    inputs = FAMILIES["llama"].inputs(llama)
    with regard.watch(llama.model, Rows()) as seen:
        llama.model(**inputs)
        with pytest.raises(RegardError, match="attached as part of another model"), regard.watch(llama):
            pass
        llama.model(**inputs)
    assert seen[Rows] == {"text.0": 2, "text.1": 2}
    assert state(llama) == before


def test_names_of_lenses_are_told_apart(llama):
    with pytest.raises(RegardError, match="Two lenses are named 'a'"):
        regard.watch(llama, Rows(name="a"), Rows(name="a"))
    with regard.watch(llama, Rows(), Rows(), Rows(name="a")) as seen:
        run(llama)
    assert list(seen.lenses) == ["Rows", "Rows-2", "a"]
    assert seen["a"] == seen["Rows-2"] == {"text.0": 1, "text.1": 1}
    with pytest.raises(RegardError, match="3 lenses 'Rows'.*Rows, Rows-2, a"):
        seen[Rows]
    with pytest.raises(RegardError, match="no lens 'b'.*Rows, Rows-2, a"):
        seen["b"]


def test_what_is_no_stage_is_refused(llama):
    with pytest.raises(RegardError, match="takes lenses"):
        regard.watch(llama, Sharper())
    with pytest.raises(RegardError, match="neither a Lens nor an Edit"):
        regard.steer(llama, "sharper")
    with pytest.raises(RegardError, match="at least one edit"):
        regard.steer(llama)


def test_silent_sites_are_named():
    model = FAMILIES["bart"].build("sdpa")
    inputs = FAMILIES["bart"].inputs(model)
    encoder = model.get_encoder()
    with torch.no_grad(), regard.watch(model, Rows()) as seen:
        encoder(inputs["input_ids"])
        during = seen.silent
    assert during == seen.silent == ["decoder.0", "cross.0", "decoder.1", "cross.1"]
    assert seen[Rows] == {"encoder.0": 1, "encoder.1": 1}


def test_nothing_observed_says_why(llama):
    with pytest.raises(NothingObserved, match="LlamaForCausalLM was not run"), regard.watch(llama):
        pass
    with pytest.raises(NothingObserved, match="none of its 2 attention modules"), regard.watch(llama):
        llama.config._attn_implementation_internal = "eager"
        run(llama)
    with regard.watch(llama) as seen:
        run(llama)
    with pytest.raises(NothingObserved, match="No weights yet"):
        regard.watch(llama).weights(0, 0)
    assert seen.silent == []
