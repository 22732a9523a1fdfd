"""`Session.weights` against `output_attentions`: after a forward, after `generate()`, under edits."""

import pytest
import torch

import regard
from regard.errors import NoSuchSite, NothingObserved, RegardError
from regard.lens import Entropy
from regard.runtime import Edit
from regard.runtime.edits import ScoreBias
from tests.runtime.test_contract import attentions_by_alias
from tests.support.families import FAMILIES
from tests.support.stages import Rows, Sharper, run

NEW = 4


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"].build("eager")


def attentions(model, inputs, sites):
    """What transformers returns, by alias."""
    with torch.no_grad():
        return attentions_by_alias(model(**inputs, output_attentions=True, use_cache=False), sites)


def rows_of(inputs, alias, sequence):
    """Which query rows of a sequence are real."""
    mask = inputs.get("attention_mask")
    if mask is None or not alias.startswith(("text", "encoder")):
        return slice(None)
    return mask[sequence].bool()


def same(seen, expected, inputs):
    assert expected
    for alias, each in expected.items():
        for head, sequence in ((0, 1), (each.shape[1] - 1, 0)):
            found = seen.weights(alias, head, sequence)
            assert found.dtype == torch.float32
            keep = rows_of(inputs, alias, sequence)
            assert found.shape == each.shape[2:]
            assert torch.allclose(found[keep], each[sequence, head][keep], atol=1e-5), alias


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt-oss", "bert", "t5", "bart", "llava"])
def test_after_a_forward(name, padding):
    model = FAMILIES[name].build("eager")
    inputs = FAMILIES[name].inputs(model, padding)
    with torch.no_grad(), regard.watch(model) as seen:
        model(**inputs)
        same(seen, attentions(model, inputs, seen.sites), inputs)
    same(seen, attentions(model, inputs, seen.sites), inputs)


@pytest.mark.parametrize("name", ["vit", "whisper"])
def test_without_tokens(name):
    model = FAMILIES[name].build("eager")
    inputs = FAMILIES[name].inputs(model)
    with torch.no_grad(), regard.watch(model) as seen:
        model(**inputs)
    same(seen, attentions(model, inputs, seen.sites), inputs)


WAYS = {
    "greedy": {}, "static": {"cache_implementation": "static"}, "no-cache": {"use_cache": False},
    "chunked": {"prefill_chunk_size": 4}, "one": {"max_new_tokens": 1},
    "static-one": {"max_new_tokens": 1, "cache_implementation": "static"},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_after_generate(name, padding, way):
    model = FAMILIES[name].build("eager")
    inputs = FAMILIES[name].inputs(model, padding)
    with regard.watch(model) as seen:
        ids = model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, **WAYS[way]})
        during = seen.weights(1, 2)
    whole = lengthened(inputs, ids[:, :-1])
    same(seen, attentions(model, whole, seen.sites), whole)
    assert torch.equal(seen.weights(1, 2), during)


def lengthened(inputs, ids):
    """The inputs of one forward over all tokens."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    more = torch.ones(len(ids), ids.shape[1] - mask.shape[1], dtype=mask.dtype)
    return {**inputs, "input_ids": ids, "attention_mask": torch.cat([mask, more], 1)}


@pytest.mark.parametrize("name", ["llava", "gemma3-images", "qwen2-vl"])
def test_after_generating_from_images(name):
    model = FAMILIES[name].build("eager")
    inputs = FAMILIES[name].inputs(model)
    with regard.watch(model) as seen:
        ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    whole = lengthened(inputs, ids[:, :-1])
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            whole[key] = torch.nn.functional.pad(inputs[key], (0, NEW - 1))
    expected = {a: x for a, x in attentions(model, whole, seen.sites).items() if a.startswith("text")}
    same(seen, expected, whole)


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_after_generating_with_an_encoder(name, padding):
    model = FAMILIES[name].build("eager")
    inputs = FAMILIES[name].inputs(model, padding)
    del inputs["decoder_input_ids"]
    with regard.watch(model) as seen:
        ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    whole = {**inputs, "decoder_input_ids": ids[:, :-1]}
    expected = attentions(model, whole, seen.sites)
    same(seen, {a: x for a, x in expected.items() if not a.startswith("encoder")}, whole)
    with pytest.raises(NothingObserved, match=r"encoder\.0"):
        seen.weights("encoder.0", 0)


def test_after_beams(llama):
    inputs = FAMILIES["llama"].inputs(llama, "left")
    with regard.watch(llama) as seen:
        ids = llama.generate(**inputs, max_new_tokens=NEW, do_sample=False, num_beams=3)
    tokens = seen.last_run.token_ids
    assert tokens.shape == (6, ids.shape[1] - 1)
    mask = inputs["attention_mask"].repeat_interleave(3, 0)
    whole = lengthened({"input_ids": mask, "attention_mask": mask}, tokens)
    expected = attentions(llama, whole, seen.sites)["text.1"]
    for beam in (0, 2, 5):
        keep = whole["attention_mask"][beam].bool()
        assert torch.allclose(seen.weights(1, 3, beam)[keep], expected[beam, 3][keep], atol=1e-5)


@pytest.mark.parametrize("generating", [False, True])
def test_under_edits(llama, generating):
    """Sharper scores are those of queries that are multiplied beforehand."""
    inputs = FAMILIES["llama"].inputs(llama, "left")
    with torch.no_grad(), regard.steer(llama, Sharper(3.0)) as seen:
        ids = llama.generate(**inputs, max_new_tokens=NEW, do_sample=False)[:, :-1]
        if not generating:
            llama(**inputs)
        during = seen.weights(0, 1)
    whole = lengthened(inputs, ids) if generating else inputs
    for layer in llama.model.layers:
        layer.self_attn.scaling *= 3.0
    expected = attentions(llama, whole, seen.sites)
    for layer in llama.model.layers:
        layer.self_attn.scaling /= 3.0
    same(seen, expected, whole)
    assert torch.equal(during, seen.weights(0, 1))
    assert not torch.allclose(attentions(llama, whole, seen.sites)["text.0"], expected["text.0"], atol=1e-2)


def test_under_the_edits_of_an_outer_session_once(llama):
    inputs = FAMILIES["llama"].inputs(llama)
    with torch.no_grad(), regard.steer(llama, Sharper()):
        with regard.watch(llama) as inner:
            llama(**inputs)
            during = inner.weights(1, 0)
        between = inner.weights(1, 0)
        with regard.steer(llama, Sharper(5.0)):
            llama(**inputs)
            beneath = inner.weights(1, 0)
    after = inner.weights(1, 0)
    assert torch.equal(during, between)
    assert torch.equal(during, after)
    assert torch.equal(during, beneath)


def test_under_edits_that_need_spans(llama):
    inputs = FAMILIES["llama"].inputs(llama)
    spans = {"front": torch.arange(9).expand(2, -1) < 3}
    edit = ScoreBias(-1e4, layers=[1], heads=[2], span="front")
    with torch.no_grad(), regard.steer(llama, edit, spans=spans) as seen:
        llama.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        during = seen.weights(1, 2)
    assert torch.equal(seen.weights(1, 2), during)
    assert during.shape == (12, 12)
    assert during[3:, :3].max() == 0
    assert seen.weights(1, 1)[3:, :3].max() > 0


def test_looking_again_counts_for_no_lens(llama):
    with regard.watch(llama, Rows(), Entropy()) as seen:
        run(llama)
        before = seen[Entropy].grid("entropy")
        seen.weights(0, 1)
        seen.weights(1, 1)
        assert (seen[Entropy].grid("entropy") == before).all()
        run(llama)
    assert seen[Rows] == {"text.0": 2, "text.1": 2}
    assert seen.called == {"text.0": 2, "text.1": 2}
    with regard.watch(llama, Rows()) as other:
        run(llama)
        seen.weights(0, 1)
    assert other[Rows] == {"text.0": 1, "text.1": 1}


def test_looking_again_is_no_run_for_an_edit(llama):
    """What an edit keeps in the run that is being continued stays as it was."""

    class Steps(Edit):
        def prepare(self, run, kwargs):
            state = run.state(self)
            state["count"] = state.get("count", 0) + 1

    edit, ids = Steps(), FAMILIES["llama"].inputs(llama)["input_ids"]
    with torch.no_grad(), regard.steer(llama, edit) as seen:
        cache = llama(ids[:, :6], use_cache=True).past_key_values
        seen.weights(0, 0)
        llama(ids[:, 6:7], past_key_values=cache)
        found = seen.weights(0, 0)
    assert seen.last_run.state(edit)["count"] == 2
    assert seen.last_run.step == 1
    expected = attentions(llama, {"input_ids": ids[:, :7]}, seen.sites)["text.0"][0, 0]
    assert torch.allclose(found, expected, atol=1e-5)


def test_what_is_not_there_is_refused(llama):
    with regard.watch(llama) as seen:
        run(llama)
    with pytest.raises(NoSuchSite, match="heads 0 to 3"):
        seen.weights(0, 4)
    with pytest.raises(NoSuchSite, match=r"text\.0 to text\.1"):
        seen.weights(2, 0)
    with pytest.raises(RegardError, match="sequence 2.*2 sequences"):
        seen.weights(0, 0, 2)
