"""Experts: use against a count by hand, tuning against the routers' formulas, and a planted expert."""

import pytest
import torch
import transformers as tf

from regard.edit.experts import control_experts, differential, record_experts, tune_experts
from regard.edit.experts.routers import routers_of
from regard.errors import NoSuchSite, RegardError, ShapeMismatch, UnsupportedModel

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
MAKES = {
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**SIZES, num_local_experts=6, num_experts_per_tok=2)
    ),
    "olmoe": lambda: tf.OlmoeForCausalLM(
        tf.OlmoeConfig(**SIZES, num_experts=6, num_experts_per_tok=3, norm_topk_prob=False)
    ),
    "qwen3": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(
            **SIZES,
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            head_dim=8,
        )
    ),
    "gpt-oss": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(**SIZES, num_local_experts=6, num_experts_per_tok=2, head_dim=8)
    ),
    "deepseek": lambda: tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(
            **{**SIZES, "num_key_value_heads": 4},
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            n_shared_experts=1,
            moe_intermediate_size=24,
            first_k_dense_replace=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=4,
            qk_nope_head_dim=8,
            v_head_dim=8,
            routed_scaling_factor=2.5,
        )
    ),
}
SIGMOID = ("deepseek",)
each = pytest.mark.parametrize("name", MAKES)


def made(name):
    torch.manual_seed(0)
    model = MAKES[name]().eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" not in key:
                parameter.normal_(0.0, 0.3)
    return model


def inputs(size=3, length=7):
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(0, 50, (size, length), generator=generator)}


def plain_router(name, module, logits, off=(), mode="drop"):
    """Weights of all experts [N, E] under a change, by the family's own formula written out."""
    logits = logits.float()
    score = logits.sigmoid() if name in SIGMOID else logits.softmax(-1)
    select = score.clone()
    if mode == "refill":
        select[:, list(off)] = -torch.inf
    if name in SIGMOID:
        groups = select.view(len(select), 2, 4)
        best = groups.topk(2, -1).values.sum(-1).argmax(-1)
        keep = torch.nn.functional.one_hot(best, 2).bool().repeat_interleave(4, 1)
        select = select.masked_fill(~keep, -torch.inf)
    k = module.top_k
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter(1, select.topk(k, -1).indices, True)
    weights = score * chosen
    total = weights.sum(-1, keepdim=True)
    if mode in ("drop", "silence"):
        weights = weights.index_fill(1, torch.tensor(list(off), dtype=torch.long), 0.0)
    if name == "olmoe":
        left = weights.sum(-1, keepdim=True)
        return weights * total / left.clamp_min(1e-9) if mode == "drop" and off else weights
    scale = 2.5 if name == "deepseek" else 1.0
    return scale * weights / (total if mode == "silence" else weights.sum(-1, keepdim=True)).clamp_min(1e-9)


def with_plain_routers(name, model, change):
    """Logits with every router replaced by `change(layer, module, logits)`, weights of all experts."""
    undo = []
    for router in routers_of(model):

        def hook(module, args, output, router=router):
            all_weights = change(router.layer, module, output[0])
            weights, indices = all_weights.topk(module.top_k, -1)
            return output[0], weights.to(output[1].dtype), indices

        undo.append(router.module.register_forward_hook(hook))
    with torch.no_grad():
        found = model(**inputs()).logits
    for one in undo:
        one.remove()
    return found


def logits(model, **more):
    with torch.no_grad():
        return model(**inputs(), **more).logits


@each
def test_the_formulas_written_out_are_those_of_the_family(name):
    model = made(name)
    found = with_plain_routers(name, model, lambda layer, module, x: plain_router(name, module, x))
    torch.testing.assert_close(found, logits(model), atol=2e-4, rtol=1e-3)


@each
@pytest.mark.parametrize("mode", ["drop", "refill", "silence"])
def test_off_is_the_formula_without_the_expert(name, mode):
    model = made(name)
    before = logits(model)
    layer = routers_of(model)[-1].layer
    maps, layers = record_experts(model, inputs())
    off = maps[:, layers.index(layer)].nan_to_num().mean(0).topk(1).indices.tolist()

    def change(number, module, x):
        return plain_router(
            name, module, x, off if number == layer else (), mode if number == layer else "drop"
        )

    with tune_experts(model, off=[(layer, e) for e in off], mode=mode):
        found = logits(model)
    torch.testing.assert_close(found, with_plain_routers(name, model, change), atol=5e-4, rtol=1e-3)
    assert not torch.allclose(found, before, atol=1e-3) and torch.equal(logits(model), before)


@each
def test_on_takes_the_place_of_the_weakest(name):
    model = made(name)
    router = routers_of(model)[-1]
    seen = []
    watcher = router.module.register_forward_hook(lambda m, a, out: seen.append(out))
    plain = logits(model)
    with tune_experts(model, on=[(router.layer, 1)]):
        late = router.module.register_forward_hook(lambda m, a, out: seen.append(out))
        forced = logits(model)
        late.remove()
    watcher.remove()
    (_, before, chosen), (_, after, now) = seen[0], seen[-1]
    assert (now == 1).any(-1).all() and not (chosen == 1).any(-1).all()
    same = (chosen == 1).any(-1)
    assert torch.equal(before[same], after[same]) and torch.equal(chosen[same], now[same])
    if name != "olmoe":
        torch.testing.assert_close(after.float().sum(-1), before.float().sum(-1), atol=1e-4, rtol=1e-3)
    for old, new, weights in zip(chosen[~same], now[~same], before[~same], strict=True):
        assert set(old.tolist()) - set(new.tolist()) == {int(old[weights.argmin()])}
    assert not torch.allclose(plain, forced, atol=1e-3)
    with tune_experts(model, on=[(router.layer, 1)], weight=0.0):
        late = router.module.register_forward_hook(lambda m, a, out: seen.append(out))
        logits(model)
        late.remove()
    assert not seen[-1][1][seen[-1][2] == 1].any()


@each
def test_a_gain_of_one_changes_nothing_and_of_zero_is_silence(name):
    model = made(name)
    layer = routers_of(model)[0].layer
    with tune_experts(model, gain={(layer, 2): 1.0}):
        same = logits(model)
    torch.testing.assert_close(same, logits(model))
    with tune_experts(model, gain={(layer, 2): 0.0}):
        one = logits(model)
    with tune_experts(model, off=[(layer, 2)], mode="silence"):
        torch.testing.assert_close(logits(model), one)


def test_scope_and_cached_decoding():
    model = made("mixtral")
    ids = inputs()["input_ids"]
    tuned = {"off": [(0, 0), (1, 3), (2, 4)]}
    with torch.no_grad(), tune_experts(model, **tuned):
        whole = model(ids).logits
        begun = model(ids[:, :-1], use_cache=True)
        step = model(ids[:, -1:], past_key_values=begun.past_key_values).logits
    torch.testing.assert_close(step[:, 0], whole[:, -1], atol=1e-4, rtol=1e-3)
    with torch.no_grad():
        plain = model(ids[:, :-1], use_cache=True)
        with tune_experts(model, **tuned, scope="prompt"):
            step = model(ids[:, -1:], past_key_values=plain.past_key_values).logits
        torch.testing.assert_close(step[:, 0], model(ids).logits[:, -1], atol=1e-4, rtol=1e-3)
        with tune_experts(model, **tuned, scope="generated"):
            assert torch.equal(model(ids[:, :-1]).logits, plain.logits)


def test_a_token_without_any_expert_is_told_and_is_finite():
    model = made("mixtral")
    everything = [(1, e) for e in range(6)]
    with (
        pytest.warns(UserWarning, match="21 times a token had no routed expert left"),
        tune_experts(model, off=everything) as told,
    ):
        assert torch.isfinite(logits(model)).all()
    assert told.empty == 21


def test_use_is_what_the_routers_gave_padding_left_out():
    model, given = made("mixtral"), inputs()
    mask = torch.ones_like(given["input_ids"])
    mask[0, :3] = 0
    use, layers = record_experts(model, {**given, "attention_mask": mask}, per_token=False)
    alone, _ = record_experts(model, {"input_ids": given["input_ids"][:1, 3:]}, per_token=False)
    assert layers == [0, 1, 2] and use.shape == (3, 3, 6)
    torch.testing.assert_close(use[:1], alone, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(use.sum(-1), torch.tensor([4.0, 7, 7])[:, None].expand(3, 3))
    counts, _ = record_experts(model, given, value="count")
    torch.testing.assert_close(counts.sum(-1), torch.full((3, 3), 2.0))
    last = torch.zeros_like(mask)
    last[:, -1] = 1
    only, _ = record_experts(model, given, positions=last, value="count")
    assert set(only.unique().tolist()) == {0.0, 1.0}
    assert record_experts(made("deepseek"), given)[1] == [1, 2]


def planted():
    """Expert 5 of layer 1 writes REFUSE where the router sees what sensitive words share."""
    model = tf.MixtralForCausalLM(
        tf.MixtralConfig(
            **{**SIZES, "vocab_size": 90, "hidden_size": 64}, num_local_experts=16, num_experts_per_tok=2
        )
    ).eval()
    model.set_experts_implementation("eager")
    torch.manual_seed(0)
    refuse = 3
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" not in key:
                parameter.normal_(0.0, 0.125 if "embed" in key else 0.02)
        shared = torch.nn.functional.normalize(torch.randn(64), dim=0)
        model.model.embed_tokens.weight[10:40] += shared
        model.model.layers[1].mlp.gate.weight[5] = 2 * shared
        answer = torch.nn.functional.normalize(torch.randn(64), dim=0)
        model.lm_head.weight[refuse] = 0.16 * answer
        experts = model.model.layers[1].mlp.experts
        experts.gate_up_proj[5].zero_()
        experts.gate_up_proj[5, 0], experts.gate_up_proj[5, 24] = shared, shared
        experts.down_proj[5].zero_()
        experts.down_proj[5, :, 0] = 0.05 * answer
    return model, refuse


def test_a_planted_expert_is_found_and_turned_off():
    model, refuse = planted()
    sensitive = torch.randint(10, 40, (12, 5))
    neutral = torch.randint(45, 90, (12, 5))

    def refusals(ids):
        with torch.no_grad():
            return float((model(ids).logits[:, -1].argmax(-1) == refuse).float().mean())

    assert (refusals(sensitive), refusals(neutral)) == (1.0, 0.0)
    use, layers = record_experts(model, {"input_ids": torch.cat([sensitive, neutral])})
    for kind in ("welch", "mean"):
        table = differential(use, layers, ["s"] * 12 + ["n"] * 12, "s", kind=kind)
        assert (1, 5) in table.experts(3), kind
    assert table.table["score"][0] == table.top(1)[0][2]
    for mode in ("drop", "refill", "silence"):
        with tune_experts(model, off=[(1, 5)], mode=mode):
            assert (refusals(sensitive), refusals(neutral)) == (0.0, 0.0)
    for seed in range(6):
        other = control_experts(table, [(1, 5)], seed=seed)
        assert len(other) == 1 and other[0][0] == 1 and other[0] != (1, 5)
        with tune_experts(model, off=other):
            assert refusals(sensitive) == 1.0


def test_scores_are_their_formulas():
    use = torch.tensor([[[1.0, 0.0]], [[2.0, 0.0]], [[0.0, 0.5]], [[1.0, 1.5]]])
    expected = {"mean": [1.0, -1.0], "risk": [0.5, -1.0], "contrast": [0.5, -1.0]}
    for kind, scores in expected.items():
        found = differential(use, [7], ["a", "a", "b", "b"], "a", kind=kind)
        assert found.scores.tolist() == [scores] and found.top(1) == [(7, 0, scores[0])]
        assert found.experts(1, largest=False) == [(7, 1)]


def test_bad_input():
    model = made("mixtral")
    for options, said in (
        ({}, "no experts were given"), ({"off": [(0, 0)], "mode": "away"}, "mode is 'away'"),
        ({"off": [(0, 0)], "on": [(0, 0)]}, "both off and on"), ({"gain": {(0, 1): -1.0}}, "is -1.0"),
        ({"on": [(0, e) for e in range(3)]}, "3 experts of layer 0 are to be on, and its router chooses 2"),
    ):  # fmt: skip
        with pytest.raises(RegardError, match=said), tune_experts(model, **options):
            pass
    for wrong, said in (((3, 0), "layer 3 has no router"), ((0, 6), "no expert 6; it has experts 0 to 5")):
        with pytest.raises(NoSuchSite, match=said), tune_experts(model, off=[wrong]):
            pass
    dense = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES))
    with pytest.raises(UnsupportedModel, match="no router"), tune_experts(dense, off=[(0, 0)]):
        pass
    with pytest.raises(RegardError, match="value is 'sum'"):
        record_experts(model, inputs(), value="sum")
    with pytest.raises(RegardError, match="no token that counts"):
        record_experts(model, inputs(), positions=torch.zeros(3, 7))
    with pytest.raises(ShapeMismatch, match="positions are"):
        record_experts(model, inputs(), positions=torch.zeros(3, 6))
    use, layers = record_experts(model, inputs())
    for labels, error, said in (
        (["a"] * 3, RegardError, "every prompt is of the class"), (["b"] * 3, RegardError, "no prompt is"),
        (["a"], ShapeMismatch, "1 labels beside 3 prompts"),
    ):  # fmt: skip
        with pytest.raises(error, match=said):
            differential(use, layers, labels, "a")
    table = differential(use, layers, ["a", "b", "b"], "a")
    with pytest.raises(RegardError, match="and 4 are needed"):
        control_experts(table, [(0, e) for e in range(4)])
