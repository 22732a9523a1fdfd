"""The minimum contract with transformers: what a session does not ask for, it does not change.

Every family of the support table is compared with its own eager attention, plain, padded, generating,
and with rows opened at every layer.
"""

import pytest
import torch

import regard
from regard.errors import NothingObserved, UnsupportedModel
from regard.runtime import Lens
from tests.support.families import FAMILIES, bloom, gptj, valid

torch.set_num_threads(1)
RELATIVE = 1e-5


class Rows(Lens):
    """Opens every row of every call and keeps nothing but a count."""

    def weights(self, block):
        self.tally.mean(block.site, "rows", torch.tensor(float(block.weights.shape[2])), 1.0)

    def result(self):
        return self.tally.get("rows")


def outputs(model, inputs):
    """What a forward returns, as one tensor [B, ...]."""
    with torch.no_grad():
        out = model(**inputs)
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        if name in out:
            return out[name]
    raise AssertionError(f"no output in {list(out)}")


def assert_same(found, expected, inputs, relative=RELATIVE):
    keep = valid(inputs, expected.shape) if expected.ndim > 2 else slice(None)
    found, expected = found[keep].float(), expected[keep].float()
    assert torch.isfinite(expected).all()
    assert (found - expected).abs().max() <= relative * expected.abs().max()


CASES = [
    pytest.param(name, padding, id=f"{name}-{padding}")
    for name, family in FAMILIES.items()
    for padding in (("none", "left", "right") if family.pads else ("none",))
]


@pytest.mark.parametrize(("name", "padding"), CASES)
def test_watching_changes_nothing(name, padding):
    family = FAMILIES[name]
    model = family.build()
    inputs = family.inputs(model, padding)
    expected = outputs(model, inputs)
    with regard.watch(model) as seen:
        idle = outputs(model, inputs)
    assert seen.silent == []
    assert_same(idle, expected, inputs)
    with regard.watch(model, Rows()) as seen:
        opened = outputs(model, inputs)
    assert set(seen[Rows]) == {site.alias for site in seen.sites}
    assert_same(opened, expected, inputs)
    assert torch.equal(outputs(model, inputs), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_watching_changes_little_in_bfloat16(name):
    """The distance to the float32 outputs is at most 1.5 times eager's own, plus 1 % of the range."""
    family = FAMILIES[name]
    model = family.build()
    inputs = family.inputs(model)
    exact = outputs(model, inputs)
    model = model.to(torch.bfloat16)
    short = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs.items()}
    eager = outputs(model, short).float()
    with regard.watch(model, Rows()):
        found = outputs(model, short).float()
    off = (found - exact).abs().mean()
    assert off <= 1.5 * (eager - exact).abs().mean() + 0.01 * exact.abs().max()


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.route == "interface"])
def test_weights_equal_eager_attentions(name):
    family = FAMILIES[name]
    padding = "left" if family.pads else "none"
    model = family.build("eager")
    inputs = family.inputs(model, padding)
    with torch.no_grad():
        out = model(**inputs, output_attentions=True)
    with regard.watch(model, KeepAll()) as seen, torch.no_grad():
        again = model(**inputs, output_attentions=True)
    kept = seen[KeepAll]
    eager, returned = attentions_by_alias(out, seen.sites), attentions_by_alias(again, seen.sites)
    assert eager or name == "clip"
    for alias, expected in eager.items():
        real = real_rows(kept[alias][1], expected)
        assert ((kept[alias][0] - expected).abs() * real).max() <= 1e-5, alias
        assert ((returned[alias] - expected).abs() * real).max() <= 1e-5, alias


def real_rows(call_valid, expected):
    """1 for rows that are no padding, [B, 1, T, 1]; padded rows are uniform over any keys."""
    if call_valid is None:
        return torch.ones(expected.shape[0], 1, expected.shape[2], 1)
    return call_valid[:, None, :, None].float()


class KeepAll(Lens):
    """Keeps the whole matrix of every call, and which of its rows are real."""

    def weights(self, block):
        call = block.call
        store = call.extra.setdefault(
            "all", block.weights.new_zeros(call.q.shape[0], call.heads, call.query_length, call.key_length)
        )
        store[:, :, block.start : block.stop, block.key_start : block.key_stop] = block.weights

    def end_call(self, call):
        self.tally.append(call.site, "all", (call.extra["all"], call.valid_queries))

    def result(self):
        return {alias: calls[-1] for alias, calls in self.tally.get("all").items()}


def attentions_by_alias(out, sites):
    """Eager attentions of a model's output, by alias; Swin gives the last block of each stage."""
    found = {}
    kinds = {"encoder_attentions": "encoder", "decoder_attentions": "decoder", "cross_attentions": "cross"}
    for key, kind in kinds.items():
        found.update({f"{kind}.{i}": x for i, x in enumerate(out.get(key) or ())})
    if out.get("attentions"):
        kind = "text" if any(site.kind == "text" for site in sites) else "vision"
        mine = [site.alias for site in sites if site.kind == kind]
        each = len(mine) // len(out["attentions"])
        found.update(zip(mine[each - 1 :: each], out["attentions"], strict=True))
    return found


GENERATING = [name for name, family in FAMILIES.items() if family.generative]
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampled": {"do_sample": True, "top_k": 5},
    "static": {"cache_implementation": "static"},
    "no-cache": {"use_cache": False},
    "chunked": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, id=f"{name}-{way}")
        for name in GENERATING
        for way in WAYS
        # Chunking changes what transformers itself generates with an encoder-decoder.
        if not (way == "chunked" and name in ("t5", "bart"))
        # Falcon has no static cache.
        if not (way == "static" and not FAMILIES[name].static)
    ],
)
def test_generating_is_the_same(name, way):
    family = FAMILIES[name]
    model = family.build()
    inputs = {k: v for k, v in family.inputs(model, "left").items() if k != "decoder_input_ids"}
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **WAYS[way]}

    def generate():
        torch.manual_seed(1)
        return model.generate(**inputs, **options)

    expected = generate()
    with regard.watch(model, Rows()):
        found = generate()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("build", [gptj, bloom])
def test_unreachable_attention_is_refused_by_class_name(build):
    model = build()
    name = "GPTJAttention" if build is gptj else "BloomAttention"
    with pytest.raises(UnsupportedModel, match=name):
        regard.watch(model, Rows())


def test_a_model_that_is_not_run_is_reported():
    model = FAMILIES["llama"].build()
    with pytest.raises(NothingObserved, match="was not run"), regard.watch(model, Rows()):
        pass


def test_falcon_with_eager_attention_is_reported_not_passed_over():
    family = FAMILIES["falcon"]
    model = family.build("eager")
    with pytest.raises(NothingObserved, match="sdpa"), regard.watch(model, Rows()):
        model(**family.inputs(model))
