"""Tuned experts as an edit: the routers' formulas, decoding, scope, files, and refusals."""

import pytest
import torch
import transformers as tf

import regard
from regard.edit import ScaleHeads, TuneExperts
from regard.edit.experts import tune_experts
from regard.edit.experts.routers import routers_of
from regard.errors import NoSuchSite, RegardError, UnsupportedModel
from tests.edit.test_experts import MAKES, SIZES, inputs, logits, made

MORE = {
    "qwen2": lambda: tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(
            **SIZES, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24,
            shared_expert_intermediate_size=24, decoder_sparse_step=1,
        )
    ),
    "deepseek-v2": lambda: tf.DeepseekV2ForCausalLM(
        tf.DeepseekV2Config(
            **{**SIZES, "num_key_value_heads": 4}, n_routed_experts=8, num_experts_per_tok=2,
            n_shared_experts=1, moe_intermediate_size=24, first_k_dense_replace=1, q_lora_rank=16,
            kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, topk_method="greedy",
            n_group=1, topk_group=1,
        )
    ),
    "glm4": lambda: tf.Glm4MoeForCausalLM(
        tf.Glm4MoeConfig(
            **SIZES, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=24,
            first_k_dense_replace=1, n_group=1, topk_group=1, head_dim=8, norm_topk_prob=True,
        )
    ),
}  # fmt: skip
each = pytest.mark.parametrize("name", [*MAKES, *MORE])


def model_of(name):
    if name in MAKES:
        return made(name)
    torch.manual_seed(0)
    model = MORE[name]().eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" not in key:
                parameter.normal_(0.0, 0.3)
    return model


@each
def test_it_does_what_tuning_around_the_model_does_and_leaves_nothing(name):
    model = model_of(name)
    last = routers_of(model)[-1]
    plain = logits(model)
    options = {"off": [(last.layer, e) for e in range(2)], "gain": {(last.layer, 4): 2.0}}
    with tune_experts(model, **options):
        expected = logits(model)
    for mode in ("drop", "silence", "refill"):
        with regard.steer(model, TuneExperts(**options, mode=mode)):
            found = logits(model)
        assert not torch.allclose(found, plain, atol=1e-3), mode
        if mode == "drop":
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)
    assert torch.equal(logits(model), plain)
    with regard.steer(model, TuneExperts(on=[(last.layer, 1)])):
        assert not torch.allclose(logits(model), plain, atol=1e-3)


@pytest.mark.parametrize("name", ["mixtral", "deepseek", "qwen2"])
def test_generation_with_a_cache_is_the_full_forward(name):
    model, ids = model_of(name), inputs(2, 5)["input_ids"]
    layer = routers_of(model)[-1].layer
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    edit = TuneExperts(off=[(layer, 0), (layer, 2)], on=[(layer, 3)])
    with regard.steer(model, edit):
        made_ids = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
        wide = torch.cat([mask, torch.ones(2, 2, dtype=mask.dtype)], 1)
        with torch.no_grad():
            whole = model(made_ids[:, :-1], attention_mask=wide).logits
    assert torch.equal(whole[:, 4:].argmax(-1), made_ids[:, 5:])


def test_scope_and_start():
    model, ids = made("mixtral"), inputs()["input_ids"]
    tuned = [(0, 0), (1, 3), (2, 4)]
    plain = logits(model)
    with regard.steer(model, TuneExperts(off=tuned, scope="generated")):
        torch.testing.assert_close(logits(model), plain, atol=1e-4, rtol=1e-3)
    with regard.steer(model, TuneExperts(off=tuned, start=4)):
        late = logits(model)
    torch.testing.assert_close(late[:, :4], plain[:, :4], atol=1e-4, rtol=1e-3)
    assert not torch.allclose(late[:, 4:], plain[:, 4:], atol=1e-3)
    mask = torch.ones_like(ids)
    mask[:, :2] = 0
    with torch.no_grad(), regard.steer(model, TuneExperts(off=tuned, start=4)):
        padded = model(ids, attention_mask=mask).logits
        begun = model(ids[:, :5], use_cache=True)
        step = model(ids[:, 5:6], past_key_values=begun.past_key_values).logits
    with torch.no_grad():
        other = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(padded[:, 2:6], other[:, 2:6], atol=1e-4, rtol=1e-3)
    assert not torch.allclose(padded[:, 6:], other[:, 6:], atol=1e-3)
    torch.testing.assert_close(step[:, 0], late[:, 5], atol=1e-4, rtol=1e-3)


def test_it_stands_beside_other_edits_and_hooks_only_where_it_acts():
    model = made("mixtral")
    plain = logits(model)
    edit, heads = TuneExperts(off=[(1, 3)]), ScaleHeads(heads=[(0, 1)])
    with regard.steer(model, heads, edit):
        both = logits(model)
        hooked = [router.layer for router in routers_of(model) if router.module._forward_hooks]
    assert hooked == [1] and not any(router.module._forward_hooks for router in routers_of(model))
    with regard.steer(model, heads):
        alone = logits(model)
    assert not torch.allclose(both, alone, atol=1e-3) and torch.equal(logits(model), plain)


def test_words_are_experts():
    edit = TuneExperts(off="4.10,3.7", gain="2.1:0.5")
    assert edit.off == ((4, 10), (3, 7)) and edit.gain == {(2, 1): 0.5}
    for words, said in (
        ({"off": "4"}, "off takes LAYER.EXPERT"),
        ({"gain": "4.1"}, "gain takes LAYER.EXPERT:FA"),
    ):
        with pytest.raises(RegardError, match=said):
            TuneExperts(**words)


def test_a_set_comes_back_for_its_own_model_alone(tmp_path):
    model, path = made("mixtral"), tmp_path / "set.json"
    edit = TuneExperts(off=[(0, 1)], gain={(2, 3): 0.5}, mode="refill", scope="prompt")
    regard.save_edits(path, model, edit)
    (again,) = regard.load_edits(path, model)
    for name in ("off", "on", "gain", "mode", "scope", "weight", "start"):
        assert getattr(again, name) == getattr(edit, name), name
    with pytest.raises(RegardError, match=r"set\.json was made for Mixtral.*Olmoe.*fit them to it anew"):
        regard.load_edits(path, made("olmoe"))
    with pytest.raises(NoSuchSite, match="no expert 6"):
        regard.save_edits(tmp_path / "b.json", model, TuneExperts(off=[(0, 6)]))
    assert not (tmp_path / "b.json").exists()


def test_bad_input():
    model = made("mixtral")
    for options, said in (
        ({}, "no experts were given"), ({"off": [(0, 0)], "on": [(0, 0)]}, "both off and on"),
        ({"gain": {(0, 1): -1.0}}, "is -1.0"), ({"off": [(0, 0)], "start": -1}, "start is -1"),
        ({"off": [(0, 0)], "mode": "away"}, "mode is 'away'"),
    ):  # fmt: skip
        with pytest.raises(RegardError, match=said):
            TuneExperts(**options)
    with pytest.raises(NoSuchSite, match="no expert 6; it has experts 0 to 5"):
        regard.steer(model, TuneExperts(off=[(0, 6)]))
    with pytest.raises(RegardError, match="its router chooses 2"):
        regard.steer(model, TuneExperts(on=[(0, e) for e in range(3)]))
    with pytest.raises(UnsupportedModel, match="no router: it is no mixture of experts"):
        regard.steer(tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)), TuneExperts(off=[(0, 0)]))
    with (
        pytest.warns(UserWarning, match="21 times a token had no routed expert left"),
        regard.steer(model, TuneExperts(off=[(1, e) for e in range(6)])),
    ):
        assert torch.isfinite(logits(model)).all()


def test_the_experts_chosen_are_those_of_steermoe():
    """SteerMoE moves logits of experts beyond the others' before the choice: the same sets must come out."""
    model = made("mixtral")
    router = routers_of(model)[1]
    seen = []
    watcher = router.module.register_forward_hook(lambda m, a, out: seen.append(out))
    logits(model)
    watcher.remove()
    scores = seen[0][0].log_softmax(-1)
    low, high = scores.clone(), scores.clone()
    low[:, [0, 3]] = scores.min(-1, keepdim=True).values - 0.01
    high[:, 2] = scores.max(-1).values + 0.01
    for options, moved in (({"off": [(1, 0), (1, 3)], "mode": "refill"}, low), ({"on": [(1, 2)]}, high)):
        with regard.steer(model, TuneExperts(**options)):
            watcher = router.module.register_forward_hook(lambda m, a, out: seen.append(out))
            logits(model)
            watcher.remove()
        chosen = seen[-1][2].sort(-1).values
        assert torch.equal(chosen, moved.topk(2, -1).indices.sort(-1).values), options
