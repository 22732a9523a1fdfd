"""Every part of a model, found by structure, against what transformers calls it and what it computes."""

import gc
import weakref

import pytest
import torch
from torch import nn

from regard.errors import NoSuchSite, UnsupportedModel
from regard.runtime import Point
from regard.runtime.anatomy import anatomy_of, require_attention, root_of
from regard.runtime.site import POINT_KINDS
from tests.support.families import FAMILIES, gptj

TWO = range(2)


def names(form, kinds):
    """`form` with the number of each layer, by alias."""
    return {f"{kind}.{i}": form.format(i) for kind in kinds for i in TWO}


SITES = {
    "llama": names("model.layers.{}.self_attn", ["text"]),
    "gpt2": names("transformer.h.{}.attn", ["text"]),
    "mixtral": names("model.layers.{}.self_attn", ["text"]),
    "falcon": names("transformer.h.{}.self_attention", ["text"]),
    "gpt-neox": names("gpt_neox.layers.{}.attention", ["text"]),
    "opt": names("model.decoder.layers.{}.self_attn", ["text"]),
    "bert": names("encoder.layer.{}.attention.self", ["text"]),
    "modernbert": names("layers.{}.attn", ["text"]),
    "bart": {
        **names("model.encoder.layers.{}.self_attn", ["encoder"]),
        **names("model.decoder.layers.{}.self_attn", ["decoder"]),
        **names("model.decoder.layers.{}.encoder_attn", ["cross"]),
    },
    "t5": {
        **names("encoder.block.{}.layer.0.SelfAttention", ["encoder"]),
        **names("decoder.block.{}.layer.0.SelfAttention", ["decoder"]),
        **names("decoder.block.{}.layer.1.EncDecAttention", ["cross"]),
    },
    "llava": {
        **names("model.vision_tower.encoder.layers.{}.self_attn", ["vision"]),
        **names("model.language_model.layers.{}.self_attn", ["text"]),
    },
    "clip": {
        **names("text_model.encoder.layers.{}.self_attn", ["text"]),
        **names("vision_model.encoder.layers.{}.self_attn", ["vision"]),
    },
}
MAIN = {"bart": "decoder", "t5": "decoder", "vit": "vision", "swin": "vision"}


def built(name):
    family = FAMILIES[name]
    model = family.build(family.plain)
    return model, anatomy_of(model), family.inputs(model)


@pytest.mark.parametrize("name", SITES)
def test_sites_have_short_names_in_order(name):
    model, anatomy, _ = built(name)
    assert {site.alias: site.name for site in anatomy.sites} == SITES[name]
    assert anatomy.main == MAIN.get(name, "text")
    for site in anatomy.sites:
        assert model.get_submodule(site.name) is site.module
        assert anatomy.site(site.alias) is anatomy.site(site.name) is site
        assert site.cross == site.alias.startswith("cross")
        assert site.heads == 4
        assert site.route == ("sdpa" if name == "falcon" else "interface")
    assert anatomy.site(1).alias == f"{anatomy.main}.1"


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_out_of_reach_in_any_family(name):
    _model, anatomy, _ = built(name)
    assert anatomy.sites
    pooling = {"gemma3-images": [("model.vision_tower.head", "SiglipMultiheadAttentionPoolingHead")]}
    assert anatomy.unreachable == pooling.get(name, [])
    assert len({site.alias for site in anatomy.sites}) == len(anatomy.sites)
    for site in anatomy.sites:
        assert site.heads
        assert anatomy.output_projection(site).weight.ndim == 2


def spied(module, model, inputs, side="output"):
    """What one module is given or gives in a forward, and the forward's output."""
    kept = []

    def before(module, args, kwargs):
        kept.append(args[0] if args else next(iter(kwargs.values())))

    def after(module, args, output):
        kept.append(output[0] if isinstance(output, tuple) else output)

    if side == "input":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    handle.remove()
    return kept[0], out


EMBEDDING = {
    "llama": "model.embed_tokens", "gpt2": "transformer.wte", "mixtral": "model.embed_tokens",
    "bart": "model.shared", "bert": "embeddings.word_embeddings", "vit": "embeddings.patch_embeddings",
    "llava": "model.language_model.embed_tokens", "t5": "shared", "falcon": "transformer.word_embeddings",
}  # fmt: skip
FINAL_NORM = {
    "llama": "model.norm", "gpt2": "transformer.ln_f", "mixtral": "model.norm", "vit": "layernorm",
    "llava": "model.language_model.norm", "t5": "decoder.final_layer_norm", "falcon": "transformer.ln_f",
    "opt": "model.decoder.final_layer_norm", "gpt-neox": "gpt_neox.final_layer_norm",
}  # fmt: skip
UNEMBEDDING = {
    "llama": "lm_head", "gpt2": "lm_head", "mixtral": "lm_head", "bart": "lm_head", "llava": "lm_head",
    "t5": "lm_head", "gpt-neox": "lm_head", "falcon": "lm_head",
}  # fmt: skip


@pytest.mark.parametrize("name", EMBEDDING)
def test_the_embedding(name):
    model, anatomy, _ = built(name)
    assert anatomy.embedding is model.get_submodule(EMBEDDING[name])


@pytest.mark.parametrize("name", FINAL_NORM)
def test_the_final_norm(name):
    model, anatomy, inputs = built(name)
    assert anatomy.final_norm is model.get_submodule(FINAL_NORM[name])
    found, out = spied(anatomy.final_norm, model, inputs)
    last = out.get("decoder_hidden_states") or out.hidden_states
    assert torch.allclose(found, last[-1] if name != "vit" else out.last_hidden_state, atol=1e-6)


@pytest.mark.parametrize("name", UNEMBEDDING)
def test_the_unembedding(name):
    model, anatomy, inputs = built(name)
    assert anatomy.unembedding is model.get_submodule(UNEMBEDDING[name])
    found, out = spied(anatomy.unembedding, model, inputs)
    assert torch.allclose(found, out.logits, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "bert", "bart"])
def test_parts_that_are_not_there(name):
    _model, anatomy, _ = built(name)
    missing = {"vit": "logits", "bert": "logits", "bart": "final_norm"}[name]
    with pytest.raises(NoSuchSite, match=f"has no {missing} that regard can find"):
        anatomy.place(Point(missing))


MODELS = ["llama", "gpt2", "bart", "mixtral", "vit", "llava", "bert", "t5", "gpt-neox", "falcon", "opt"]


@pytest.mark.parametrize("name", MODELS)
def test_blocks_take_and_give_the_residual_stream(name):
    model, anatomy, inputs = built(name)
    given, out = spied(anatomy.block(1), model, inputs, "input")
    states = out.get("decoder_hidden_states") or out.hidden_states
    assert torch.allclose(given, states[1], atol=1e-6)
    blocks = anatomy.blocks()
    assert [model.get_submodule(n) for n, _ in blocks] == [anatomy.block(i) for i in TWO]
    first, _ = spied(blocks[0][1], model, inputs)
    assert torch.allclose(first, given, atol=1e-6)


def test_blocks_of_another_kind():
    model, anatomy, _ = built("llava")
    layers = model.model.vision_tower.encoder.layers
    assert [block for _, block in anatomy.blocks("vision")] == list(layers)
    assert anatomy.block("vision.1") is layers[1]
    assert anatomy.blocks("audio") == []


@pytest.mark.parametrize("name", MODELS)
def test_the_output_weight_splits_attention_by_head(name):
    """Head outputs times their columns, and the bias, are what the attention module gives."""
    model, anatomy, inputs = built(name)
    for site in anatomy.sites:
        projection = anatomy.output_projection(site)
        joined, _ = spied(projection, model, inputs, "input")
        expected, _ = spied(projection, model, inputs)
        weight = anatomy.output_weight(site)
        assert weight.shape[:2] == (expected.shape[-1], 4)
        heads = joined.unflatten(-1, (4, -1))
        found = torch.einsum("...hd,mhd->...hm", heads, weight).sum(-2)
        if projection.bias is not None:
            found = found + projection.bias
        assert torch.allclose(found, expected, atol=1e-5), site


@pytest.mark.parametrize("name", ["llama", "mixtral", "llava", "gpt2", "opt", "vit"])
def test_attention_and_mlp_add_up_to_the_block(name):
    model, anatomy, inputs = built(name)
    before, _ = spied(anatomy.block(1), model, inputs, "input")
    attention, _ = spied(anatomy.output_projection(anatomy.site(1)), model, inputs)
    mlp, _ = spied(anatomy.mlp(1), model, inputs)
    after, _ = spied(anatomy.block(1), model, inputs)
    assert torch.allclose(before + attention + mlp.view_as(before), after, atol=1e-4)


def test_the_router_and_the_experts():
    model, anatomy, inputs = built("mixtral")
    mlp = model.model.layers[1].mlp
    assert anatomy.mlp(1) is mlp
    assert anatomy.router(1) is mlp.gate
    assert anatomy.experts(1) is mlp.experts
    logits, _ = spied(anatomy.router(1), model, inputs)
    assert logits.shape == (18, 4)
    given, _ = spied(mlp, model, inputs, "input")
    assert torch.allclose(logits, given.view(18, 32) @ mlp.gate.weight.T, atol=1e-5)


@pytest.mark.parametrize(
    ("point", "match"),
    [
        (Point("attn", 0), r"no point 'attn'; points are embedding, residual_pre"),
        (Point("mlp"), r"needs a layer: text\.0 to text\.1"),
        (Point("mlp", 2), r"LlamaForCausalLM has no layer 2; it has text\.0 to text\.1\."),
        (Point("mlp", -1), r"has no layer -1"),
        (Point("mlp", "text.7"), r"no layer 'text\.7'.*Did you mean text\."),
        (Point("mlp", "vision.0"), r"no layer 'vision\.0'"),
        (Point("head", 0, head=1), r"no module of their own"),
        (Point("router", 0), r"no router that regard can find in text\.0"),
    ],
)
def test_points_that_are_not_there(point, match):
    _model, anatomy, _ = built("llama")
    with pytest.raises(NoSuchSite, match=match):
        anatomy.place(point)


def test_heads_experts_and_layers_that_are_not_there():
    _model, anatomy, _ = built("llava")
    with pytest.raises(NoSuchSite, match=r"text\.1 has no head 4; it has heads 0 to 3"):
        anatomy.check_head(1, 4)
    with pytest.raises(NoSuchSite, match=r"no head -1"):
        anatomy.check_head("vision.0", -1)
    assert anatomy.check_head("vision.1", 3) is anatomy.site("vision.1")
    with pytest.raises(NoSuchSite, match=r"no mixture of experts that regard can find in text\.0"):
        anatomy.experts(0)
    with pytest.raises(NoSuchSite, match=r"it has vision\.0 to vision\.1 and text\.0 to text\.1"):
        anatomy.site(5)


@pytest.mark.parametrize("kind", [k for k in POINT_KINDS if k != "head"])
def test_every_point_has_a_place(kind):
    model, anatomy, inputs = built("mixtral")
    layer = None if kind in ("embedding", "final_norm", "logits") else 1
    module, side, index = anatomy.place(Point(kind, layer))
    found, _ = spied(module, model, inputs, side)
    width = {"logits": 97, "router": 4}.get(kind, 32)
    assert found.shape[-1] == width
    assert index == 0


def test_parts_are_found_again_where_a_module_was_replaced():
    model, anatomy, _ = built("llama")
    assert anatomy_of(model) is anatomy
    model.model.layers[1] = FAMILIES["llama"].build(seed=1).model.layers[1]
    again = anatomy_of(model)
    assert again is not anatomy
    assert again.site(1).module is model.model.layers[1].self_attn
    model.model.layers = model.model.layers[:1]
    assert [site.alias for site in anatomy_of(model).sites] == ["text.0"]


def test_layers_that_were_added_are_found():
    model, _, _ = built("llama")
    model.model.layers.append(FAMILIES["llama"].build(seed=1).model.layers[1])
    assert [site.alias for site in anatomy_of(model).sites] == ["text.0", "text.1", "text.2"]


def test_an_anatomy_keeps_no_model_alive():
    model, anatomy, _ = built("llama")
    sites = [weakref.ref(site.module) for site in anatomy.sites]
    gone = weakref.ref(model)
    del model, anatomy
    gc.collect()
    assert gone() is None
    assert [site() for site in sites] == [None, None]


def test_a_model_without_reachable_attention():
    model, plain = gptj(), nn.Linear(2, 2)
    anatomy = anatomy_of(model)
    assert anatomy.sites == []
    assert {kind for _, kind in anatomy.unreachable} == {"GPTJAttention"}
    with pytest.raises(UnsupportedModel, match="GPTJAttention"):
        require_attention(anatomy)
    with pytest.raises(UnsupportedModel, match="no attention module"):
        require_attention(anatomy_of(plain))
    with pytest.raises(NoSuchSite, match="it has no attention that can be reached"):
        anatomy.site(0)


class Wrapped(nn.Module):
    def __init__(self, *models):
        super().__init__()
        self.inside = nn.ModuleList(models)


def test_the_model_inside_its_wrappers():
    model, other = FAMILIES["llama"].build(), FAMILIES["bert"].build()
    assert root_of(model) is root_of(Wrapped(model)) is root_of(Wrapped(Wrapped(model))) is model
    both = Wrapped(model, other)
    assert root_of(both) is both
    assert len(anatomy_of(both).sites) == 4
    plain = nn.Linear(2, 2)
    assert root_of(plain) is plain
    with pytest.raises(UnsupportedModel, match=r"needs a torch.nn.Module, and got str"):
        root_of("gpt2")
