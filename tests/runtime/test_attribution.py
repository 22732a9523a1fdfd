"""The parts of a logit sum to it, and each is what leaving it out of the residual stream's sum changes."""

import re

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from regard.errors import RegardError, ShapeMismatch, UnsupportedModel
from regard.runtime.attribution import attribute_logits
from tests.runtime.test_paths import gpt2, llama, neox

SIZES = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
NONE = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)


def gemma():
    return GemmaForCausalLM(GemmaConfig(**SIZES, **NONE, num_key_value_heads=2, head_dim=8))


def phi():
    return PhiForCausalLM(PhiConfig(**SIZES, **NONE))


def made(family):
    torch.manual_seed(0)
    model = family().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.5 if p.ndim == 1 else 0.0, 0.25)
    return model, torch.randint(3, 50, (2, 6))


@pytest.mark.parametrize("family", [llama, gpt2, neox, gemma, phi])
def test_parts_sum_to_the_logits(family):
    model, ids = made(family)
    tokens = torch.tensor([[1, 5, 7], [2, 4, 9]])
    found = attribute_logits(model, {"input_ids": ids}, tokens)
    with torch.no_grad():
        expected = model(ids).logits[:, -1].gather(1, tokens)
    torch.testing.assert_close(found.logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.total.float(), expected, rtol=1e-5, atol=1e-4)
    exact = attribute_logits(model.double(), {"input_ids": ids}, tokens)
    torch.testing.assert_close(exact.total.float(), exact.logits, rtol=1e-6, atol=1e-5)
    assert float(found.heads.abs().nan_to_num().max()) > 1e-3


def test_a_head_adds_what_its_output_makes_of_the_held_norm():
    model, ids = made(llama)
    found = attribute_logits(model, {"input_ids": ids}, torch.tensor([8]), position=2)
    kept = {}
    layer = model.model.layers[1].self_attn.o_proj
    layer.register_forward_pre_hook(lambda _, x: kept.__setitem__("z", x[0]))
    model.model.norm.register_forward_pre_hook(lambda _, x: kept.__setitem__("x", x[0]))
    with torch.no_grad():
        model(ids)
    wrote = kept["z"][:, 2, 16:24] @ layer.weight[:, 16:24].T
    scale = (kept["x"][:, 2].square().mean(-1, keepdim=True) + model.config.rms_norm_eps).rsqrt()
    expected = (wrote * scale * model.model.norm.weight) @ model.lm_head.weight[8]
    torch.testing.assert_close(found.heads[1, 2, :, 0].float(), expected, rtol=1e-4, atol=1e-5)


def test_net_effects_and_output_nodes():
    model, ids = made(llama)
    found = attribute_logits(model, {"input_ids": ids}, torch.tensor([1, 5, 7]))
    net = found.net()
    torch.testing.assert_close(net.logits[:, 0], found.logits[:, 0] - found.logits[:, 1:].mean(1))
    torch.testing.assert_close(net.total[:, 0].float(), net.logits[:, 0], rtol=1e-4, atol=1e-4)
    table = net.table("effect")
    assert table["effect"].tolist() == pytest.approx(net.heads[..., 0].mean(2).flatten().tolist())
    every, most = net.output_nodes(1.0), net.output_nodes(0.5)
    assert most == every[: len(most)] and len(most) < len(every)
    positive = sum(x for *_, x in every)
    assert sum(x for *_, x in most) >= 0.5 * positive > sum(x for *_, x in most[:-1])
    with pytest.raises(RegardError, match="two tokens at least"):
        net.net()
    with pytest.raises(RegardError, match="share is 0"):
        net.output_nodes(0)


def test_models_that_cannot_be_taken_apart_are_refused():
    gemma2 = lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, **NONE, num_key_value_heads=2, head_dim=8))  # noqa: E731
    sizes = {k: v for k, v in SIZES.items() if k != "intermediate_size"}
    opt = lambda: OPTForCausalLM(OPTConfig(**sizes, **NONE, ffn_dim=48, word_embed_proj_dim=32))  # noqa: E731
    bert = lambda: BertModel(BertConfig(**SIZES))  # noqa: E731
    for family, said in ((gemma2, "norms or scales"), (opt, "joins sequences"), (bert, "no unembedding")):
        model, ids = made(family)
        with pytest.raises(UnsupportedModel, match=said):
            attribute_logits(model, {"input_ids": ids}, torch.tensor([1]))


def test_bad_tokens():
    model, ids = made(llama)
    with pytest.raises(ShapeMismatch, match=re.escape("tokens are [3, 1]; they must be [K] or [2, K]")):
        attribute_logits(model, {"input_ids": ids}, torch.ones(3, 1, dtype=torch.int64))
    with pytest.raises(RegardError, match="logits over 50 tokens"):
        attribute_logits(model, {"input_ids": ids}, torch.tensor([50]))
