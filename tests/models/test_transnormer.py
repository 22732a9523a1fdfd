"""TransNormerLLM: its equations, its cache in generate(), padding, saving, checkpointing, refusals."""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache

import regard
from regard.attention import Softmax, decay_rates
from regard.errors import RegardError, ShapeMismatch, UnsupportedModel
from regard.lens import Sinks
from regard.models.transnormer import TNLConfig, TNLForCausalLM, TNLModel
from regard.runtime.carried import StateLayer

SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "hidden_dim": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
}


def small(seed=0, **options):
    """Readout and embedding are not tied unless asked, for else it repeats the last token."""
    options = {"tie_word_embeddings": False, **options}
    torch.manual_seed(seed)
    model = TNLForCausalLM(TNLConfig(**{**SIZES, **options})).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(4 if "theta" not in name else 1)
    return model


def tokens(length, batch=2, seed=0):
    return torch.randint(3, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_the_equations_written_out():
    model = small().double()
    weights, ids = model.state_dict(), tokens(11)
    x = 24**0.5 * weights["model.embed_tokens.weight"][ids]

    def norm(x):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    def heads(x):
        return x.unflatten(-1, (3, 8)).transpose(1, 2)

    steps = torch.arange(11, dtype=torch.float64)
    for layer in range(3):
        own = {
            name.split(f"layers.{layer}.")[1]: w for name, w in weights.items() if f"layers.{layer}." in name
        }
        q, k, v, u = (norm(x) @ own["token_mixer.qkvu_proj.weight"].T).chunk(4, -1)
        q, k, v = heads(F.silu(q)), heads(F.silu(k)), heads(v)
        if layer == 0:
            theta = own["token_mixer.lrpe.theta"]
            apart = steps[:, None, None] - steps[None, :, None]
            turned = torch.cos(apart * theta[:, None])  # [H, T, T, d]
            scores = torch.einsum("bhid,bhjd,hijd->bhij", q, k, turned)
        else:
            assert "token_mixer.lrpe.theta" not in own
            scores = q @ k.mT
        rates = decay_rates(3, layer, 3)[:, None, None]
        mixed = (scores * torch.exp(-rates * (steps[:, None] - steps)).tril()) @ v
        x = x + (norm(mixed.transpose(1, 2).flatten(2)) * u) @ own["token_mixer.out_proj.weight"].T
        inner = (norm(x) @ own["channel_mixer.l1.weight"].T) * (norm(x) @ own["channel_mixer.l2.weight"].T)
        x = x + inner @ own["channel_mixer.l3.weight"].T
    expected = norm(x) @ weights["lm_head.weight"].T
    # the angles are float32 in the checkpoint's code and here alike, the rest is float64
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-9)


def test_parameters_have_the_names_and_shapes_of_released_checkpoints():
    shapes = {name: tuple(w.shape) for name, w in TNLForCausalLM(TNLConfig(**SIZES)).state_dict().items()}
    layer = {
        "token_mixer.qkvu_proj.weight": (96, 24),
        "token_mixer.out_proj.weight": (24, 24),
        "channel_mixer.l1.weight": (20, 24),
        "channel_mixer.l2.weight": (20, 24),
        "channel_mixer.l3.weight": (24, 20),
    }
    expected = {"model.embed_tokens.weight": (50, 24), "lm_head.weight": (50, 24)}
    expected |= {f"model.layers.{i}.{name}": shape for i in range(3) for name, shape in layer.items()}
    expected["model.layers.0.token_mixer.lrpe.theta"] = (3, 1, 8)
    assert shapes == expected


def test_no_later_token_moves_an_earlier_logit():
    model, ids = small(), tokens(40)
    changed = torch.cat([ids[:, :25], (ids[:, 25:] + 1) % 50], 1)
    off = (model(ids).logits - model(changed).logits).abs().amax((0, 2))
    assert off[:25].max() < 1e-5 and off[25:].min() > 1e-3


@pytest.mark.parametrize("sizes", [[1] * 30, [20, 1, 9], [30]])
def test_a_cache_goes_on_where_it_stopped(sizes):
    model, ids = small(), tokens(30)
    logits, cache, start = [], None, 0
    for size in sizes:
        out = model(ids[:, start : start + size], past_key_values=cache)
        logits, cache, start = [*logits, out.logits], out.past_key_values, start + size
    torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 30
    assert all(isinstance(layer, StateLayer) for layer in cache.layers)


def test_a_state_does_not_grow_and_says_what_it_holds():
    model = small()
    caches = [model(tokens(length)).past_key_values for length in (3, 300)]
    for short, long in zip(*(cache.layers for cache in caches), strict=True):
        assert [x.shape for x in short.state] == [x.shape for x in long.state]
        assert long.state[0].dtype == torch.float32 and long.state[1].tolist() == [300, 300]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generate_with_its_cache_gives_what_it_gives_without(options):
    model, ids = small(), tokens(7)
    asked = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, **options}
    found = model.generate(ids, **asked)
    assert torch.equal(found, model.generate(ids, use_cache=False, **asked))
    assert all(len(set(row)) > 8 for row in found.tolist())


@pytest.mark.parametrize("beams", [1, 3])
def test_left_padded_prompts_generate_like_each_alone(beams):
    model, ids = small(), tokens(9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    asked = {"max_new_tokens": 10, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    found = model.generate(ids, attention_mask=mask, **asked)
    for item in range(2):
        alone = ids[item : item + 1, mask[item].bool()]
        expected = model.generate(alone, **asked)
        assert torch.equal(found[item, 9:], expected[0, alone.shape[1] :])
    ignored = model.generate(ids, attention_mask=torch.ones_like(ids), **asked)
    assert not torch.equal(found[0], ignored[0])


def test_padding_at_the_right_or_in_the_middle_leaves_no_trace_in_a_cache():
    model, ids, more = small(), tokens(9), tokens(4, seed=1)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    cache = model(ids, attention_mask=mask).past_key_values
    found = model(more, attention_mask=torch.cat([mask, torch.ones_like(more)], 1), past_key_values=cache)
    alone = torch.cat([ids[:1, :6], more[:1]], 1)
    torch.testing.assert_close(found.logits[:1], model(alone).logits[:, 6:], rtol=1e-4, atol=1e-4)


def test_a_generated_cache_can_be_gone_on_with():
    model, ids = small(), tokens(6)
    asked = {"do_sample": False, "eos_token_id": None}
    first = model.generate(ids, max_new_tokens=5, return_dict_in_generate=True, **asked)
    rest = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=5, **asked)
    assert torch.equal(rest, model.generate(ids, max_new_tokens=10, **asked))


@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded_it_is_the_same(tmp_path, tied):
    model, ids = small(tie_word_embeddings=tied), tokens(9)
    with torch.no_grad():
        model.model.layers[0].token_mixer.lrpe.theta.mul_(1.7)
    model.save_pretrained(tmp_path)
    again, info = TNLForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is TNLForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)) is TNLModel
    assert AutoConfig.from_pretrained(tmp_path).to_json_string() == model.config.to_json_string()


def test_the_config_of_a_released_checkpoint_is_read(tmp_path):
    """Written as those checkpoints have it."""
    released = {
        "architectures": ["TransnormerForCausalLM"], "model_type": "transnormer", "vocab_size": 50,
        "decoder_embed_dim": 24, "decoder_layers": 3, "decoder_attention_heads": 3, "hidden_dim": 24,
        "glu_dim": 20, "linear_act_fun": "swish", "norm_type": "simplermsnorm", "init_std": 0.02,
        "linear_use_lrpe_list": [1, 0, 0], "no_scale_embedding": False, "add_bos_token": False, "bias": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.32.0", "use_cache": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(released))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is TNLConfig and config.tie_word_embeddings and config.hidden_size == 24
    model = AutoModelForCausalLM.from_config(config).float().eval()
    other = small(tie_word_embeddings=True)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(tokens(9)).logits, other(tokens(9)).logits)


def test_fresh_angles_survive_loading_a_checkpoint_without_them(tmp_path):
    model = small(linear_use_lrpe_list=[])
    model.save_pretrained(tmp_path)
    again = TNLForCausalLM.from_pretrained(tmp_path, linear_use_lrpe_list=[0, 1, 0])
    expected = small(linear_use_lrpe_list=[0, 1, 0]).model.layers[1].token_mixer.lrpe.theta
    torch.testing.assert_close(again.model.layers[1].token_mixer.lrpe.theta, expected)


def test_gradient_checkpointing_gives_the_same_gradients_and_less_memory_is_kept():
    model, ids = small().train(), tokens(20)
    plain, kept = gradients(model, ids)
    model.activation_checkpointing_enable()
    again, less = gradients(model, ids)
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other)
    assert less < kept / 2


def gradients(model, ids):
    """The gradients of the loss, and how many numbers autograd held for them."""
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (held.append(x.numel()), x)[1], lambda x: x):
        loss = model(ids, labels=ids).loss
        kept = sum(held)
        model.zero_grad()
        loss.backward()
    return [p.grad.clone() for p in model.parameters()], kept


def test_the_loss_is_that_of_the_next_token_and_falls_in_training():
    model, ids = small(), tokens(12)
    out = model(ids, labels=ids)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    optimizer = torch.optim.AdamW(model.train().parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_other_parts_of_the_interface():
    model, ids = small(), tokens(9)
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 4 and out.past_key_values is not None
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, out.logits[:, -1:])
    embeds = model.model.embed_scale * model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, out.logits)
    assert model(ids, use_cache=False).past_key_values is None
    near = model.bfloat16()(ids).logits.float()
    assert (near - out.logits).abs().max() < 0.1 * out.logits.abs().max()


@pytest.mark.parametrize(
    ("ask", "kind", "told"),
    [
        (lambda m: m(tokens(5), output_attentions=True), UnsupportedModel, "no attention weights"),
        (lambda m: m(tokens(5), attention_mask=torch.ones(2, 1, 5, 5)), UnsupportedModel, "arbitrary mask"),
        (lambda m: m(tokens(5), attention_mask=torch.ones(2, 4)), ShapeMismatch, r"must be \[2, 5\]"),
        (lambda m: m(), RegardError, "input_ids or inputs_embeds"),
        (
            lambda m: m(tokens(5), past_key_values=StaticCache(m.config, max_cache_len=9)),
            UnsupportedModel,
            "a StaticLayer",
        ),
        (lambda m: m(tokens(5), past_key_values=filled()), UnsupportedModel, "empty dynamic cache"),
        (
            lambda m: m(tokens(5), past_key_values=m(tokens(5, 3)).past_key_values),
            ShapeMismatch,
            "3 sequences",
        ),
        (
            lambda m: m.generate(tokens(5), max_new_tokens=2, cache_implementation="static"),
            UnsupportedModel,
            "StaticLayer",
        ),
        (
            lambda m: regard.watch(m, Sinks()).__enter__(),
            UnsupportedModel,
            "computes attention inside TNLLightningAttention",
        ),
        (lambda m: regard.swap(m, Softmax()), UnsupportedModel, "inside TNLLightningAttention"),
    ],
)
def test_what_it_cannot_do_is_refused(ask, kind, told):
    with pytest.raises(kind, match=told):
        ask(small())


def filled():
    cache = DynamicCache()
    cache.update(torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4, 8), 0)
    return cache


def test_an_assistant_is_refused():
    with pytest.raises(ValueError, match="assist|crop|taken back"):
        small().generate(tokens(5, 1), assistant_model=small(1), max_new_tokens=5)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"hidden_dim": 25}, "which 3 heads do not divide"),
        ({"linear_use_lrpe_list": [1]}, "has 1 entries"),
        ({"decay": "slow"}, "alibi, minimax, paper, none"),
        ({"norm_type": "batchnorm"}, "simplermsnorm, layernorm"),
        ({"linear_act_fun": "softmax"}, "silu"),
        ({"num_hidden_layers": 0}, "decoder_layers is 0"),
    ],
)
def test_wrong_sizes_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        TNLConfig(**{**SIZES, **options})
