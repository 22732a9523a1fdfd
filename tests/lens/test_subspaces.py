"""Subspaces: all directions change nothing, planted ones are found, other heads and places are left."""

import re

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import regard
from regard.errors import NoSuchSite, RegardError, ShapeMismatch, UnsupportedModel
from regard.lens.circuits import fit_subspaces
from regard.runtime.anatomy import anatomy_of
from regard.runtime.rotary import Rotary
from tests.runtime.test_attribution import phi
from tests.runtime.test_paths import gpt2, llama, neox

HEADS = [(1, 1), (1, 2)]
ALL = ("query", "key", "value")
ENDS, LABELS = torch.full((40,), 6), torch.tensor([1, 3, 5]).expand(40, -1)


def made(family):
    torch.manual_seed(0)
    model = family().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.0, 0.25)
    return model, torch.randint(3, 50, (40, 7))


def fitted(model, ids, heads=HEADS, **options):
    return fit_subspaces(model, {"input_ids": ids}, heads, queries=ENDS, keys=LABELS, **options)


@torch.no_grad()
@pytest.mark.parametrize("family", [llama, gpt2, neox, phi])
def test_all_directions_change_nothing_and_none_leaves_the_mean(family):
    model, ids = made(family)
    found = fitted(model, ids)
    plain = model(ids).logits
    with regard.steer(model, found.edit(None, queries=ENDS, keys=LABELS, components=ALL)):
        torch.testing.assert_close(model(ids).logits, plain, rtol=1e-4, atol=1e-4)
    with regard.steer(model, found.edit(0, queries=ENDS, keys=LABELS, components=ALL)):
        assert float((model(ids).logits - plain)[:, -1].abs().max()) > 1e-3
        again = fitted(model, ids, HEADS[:1])
    kept = again.samples[("text.1", 1), "query"]
    torch.testing.assert_close(
        kept, found.means[("text.1", 1), "query"].expand_as(kept), rtol=1e-4, atol=1e-5
    )
    assert torch.equal(model(ids).logits, plain)


@torch.no_grad()
def test_samples_are_what_projections_give():
    model, ids = made(llama)
    found, kept = fitted(model, ids), {}
    for name in ("q_proj", "k_proj", "v_proj"):
        module = getattr(model.model.layers[1].self_attn, name)
        module.register_forward_hook(lambda m, given, out, name=name: kept.__setitem__(name, out))
    model(ids)
    head = ("text.1", 2)
    torch.testing.assert_close(
        found.samples[head, "query"], kept["q_proj"][:, 6, 16:24], rtol=1e-4, atol=1e-5
    )
    for component, name in (("key", "k_proj"), ("value", "v_proj")):
        expected = kept[name][:, [1, 3, 5], 8:16]
        torch.testing.assert_close(found.samples[head, component], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_planted_directions_are_found():
    model, ids = made(llama)
    torch.manual_seed(1)
    basis = torch.linalg.qr(torch.randn(8, 3)).Q
    weight = model.model.layers[1].self_attn.q_proj.weight
    weight[8:16] = basis @ basis.T @ weight[8:16]
    found = fitted(model, ids)
    planted, other = ("text.1", 1), ("text.1", 2)
    assert found.spread(planted, "query")[:3].sum() > 0.999 > found.spread(other, "query")[:3].sum()
    own = found.directions[planted, "query"][:, :3]
    torch.testing.assert_close(own @ own.T, basis @ basis.T, rtol=1e-3, atol=1e-3)
    plain = model(ids).logits[:, -1]
    given = dict(queries=ENDS, keys=LABELS, components=("query",), heads=[planted])
    with regard.steer(model, found.edit(3, **given)):
        torch.testing.assert_close(model(ids).logits[:, -1], plain, rtol=1e-4, atol=1e-4)
    off = {}
    for name, basis in (("two", found.edit(2, **given)), ("drawn", found.random(0).edit(3, **given))):
        with regard.steer(model, basis):
            off[name] = float((model(ids).logits[:, -1] - plain).abs().max())
    assert min(off.values()) > 1e-3


@torch.no_grad()
def test_other_heads_and_places_are_left_alone():
    model, ids = made(llama)
    found = fitted(model, ids)
    kept = {}
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, x: kept.__setitem__("z", x[0]))
    model(ids)
    plain = kept["z"].clone()
    edit = found.edit(0, queries=ENDS, keys=LABELS, components=("key", "value"), heads=[("text.1", 1)])
    with regard.steer(model, edit):
        model(ids)
    change = (kept["z"] - plain).abs().amax(0).unflatten(-1, (4, 8)).amax(-1)  # [T, H]
    assert change[:, [0, 2, 3]].max() < 1e-6 and change[0].max() < 1e-6 and change[-1, 1] > 1e-3
    edit = found.edit(0, queries=ENDS, keys=LABELS, components=("query",), heads=[("text.1", 1)])
    with regard.steer(model, edit):
        model(ids)
    change = (kept["z"] - plain).abs().amax(0).unflatten(-1, (4, 8)).amax(-1)
    assert change[:6].max() < 1e-6 and change[6, [0, 2, 3]].max() < 1e-6 and change[6, 1] > 1e-3


def test_centroids_are_of_places():
    model, ids = made(llama)
    found = fitted(model, ids)
    key = ("text.1", 1), "key"
    expected = found.samples[key].mean(0) - found.samples[key].flatten(0, 1).mean(0)
    torch.testing.assert_close(found.centroids(*key), expected, rtol=1e-4, atol=1e-5)


def test_bad_input():
    model, ids = made(llama)
    found = fitted(model, ids, most=4)
    given = dict(queries=ENDS, keys=LABELS)
    for call, kind, said in (
        (lambda: found.edit(5, **given), RegardError, "from 0 to 4"),
        (lambda: found.edit(-1, **given), RegardError, "rank is -1"),
        (lambda: found.edit(1, components=("mlp",), **given), RegardError, "components is ['mlp']"),
        (lambda: found.edit(1, heads=[("text.0", 0)], **given), RegardError, "nothing was fitted"),
        (lambda: found.edit(1, queries=ENDS, keys=LABELS[:3]), ShapeMismatch, "give [B] and [B, places]"),
        (lambda: fitted(model, ids, []), RegardError, "heads is empty"),
        (lambda: fitted(model, ids, [(1, 4)]), NoSuchSite, "no head 4"),
        (lambda: fitted(model, ids, most=40), RegardError, "take at least 41"),
        (lambda: fitted(model, ids[:5]), ShapeMismatch, "of 40 prompts, and 5 were run"),
    ):  # fmt: skip
        with pytest.raises(kind, match=re.escape(said)):
            call()
    with pytest.raises(RegardError, match="without a cache"), regard.steer(model, found.edit(1, **given)):
        model.generate(ids, max_new_tokens=2, do_sample=False)


def test_positions_that_are_not_understood():
    sizes = dict(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, num_key_value_heads=2, head_dim=8))
    with pytest.raises(UnsupportedModel, match="several kinds of rotary"):
        Rotary(anatomy_of(model))
