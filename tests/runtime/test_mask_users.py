"""Models that do something with their mask themselves get what their own attention would have been given."""

import pytest
import torch
import transformers as tf
from transformers import masking_utils

import regard
from regard.errors import UnsupportedModel
from regard.runtime import register  # noqa: F401
from regard.runtime.anatomy import anatomy_of
from regard.runtime.function import regard_attention
from regard.runtime.mask import LazyMask, lazy_mask
from tests.support.architectures.build import tiny
from tests.support.architectures.compare import Rows, distance
from tests.support.architectures.examine import forward
from tests.support.architectures.listing import architectures

PADDED = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()


def masks(**options):
    given = {"batch_size": 2, "q_length": 5, "kv_length": 5, "attention_mask": PADDED, **options}
    return lazy_mask(**given), masking_utils.eager_mask(**given)


@pytest.mark.parametrize(
    "use",
    [
        lambda mask: torch.ones(2, 4, 5, 5) + mask,
        lambda mask: mask + torch.ones(2, 4, 5, 5),
        lambda mask: mask[:, :, :, :3],
        lambda mask: torch.cat([mask, torch.zeros(2, 1, 5, 2)], dim=-1),
        lambda mask: mask.expand(2, 4, 5, 5),
        lambda mask: torch.all(~(mask == 0.0), dim=2),
        lambda mask: torch.tensor(mask.size()),
    ],
)
def test_a_lazy_mask_used_as_a_tensor_is_the_additive_one(use):
    lazy, eager = masks()
    assert isinstance(lazy, LazyMask)
    assert lazy.dtype == eager.dtype
    assert torch.equal(use(lazy), use(eager))


def test_a_comparison_with_none_is_no_tensor():
    lazy, _ = masks()
    assert (lazy == None) is False  # noqa: E711
    assert lazy in {lazy: 0}


@pytest.mark.parametrize("name", ["doge", "deepseek_v4", "git", "bigbird_pegasus", "bridgetower"])
def test_models_that_compute_with_their_mask(name):
    """Each of these gave other outputs, or none, while watched with nothing but lazy masks."""
    case = tiny(architectures()[name])
    inputs = case.fit()
    expected = forward(case, inputs)
    with regard.watch(case.model, Rows()):
        found = forward(case, inputs)
    assert distance(found, expected)[0] <= 1e-5


def test_only_models_that_ask_what_their_mask_is_get_dense_ones():
    dense = {n: anatomy_of(tiny(architectures()[n]).model).needs_dense_masks for n in ("doge", "llama")}
    assert dense == {"doge": True, "llama": False}


@pytest.mark.parametrize(("attention", "triangular"), [("eager", False), ("sdpa", True)])
def test_without_a_mask_only_sdpa_is_causal_by_its_module(attention, triangular):
    model = llama(attention)
    module = model.model.layers[0].self_attn
    q = torch.randn(1, 1, 3, 8)
    with regard.watch(model, Rows()) as seen:
        regard_attention(module, q, q, q, None)
    weights = seen[Rows]["text.0"][0][0]
    assert bool((weights.triu(1) == 0).all()) is triangular


def test_attentions_come_where_the_model_itself_collects_them():
    case = tiny(architectures()["bridgetower"])
    inputs = case.fit()
    expected = forward(case, inputs, output_attentions=True).attentions
    with regard.watch(case.model):
        found = forward(case, inputs, output_attentions=True).attentions
    assert len(found) == len(expected)
    for pair, plain in zip(found, expected, strict=True):
        for mine, theirs in zip(pair, plain, strict=True):
            assert (mine - theirs).abs().max() <= 1e-5


def test_keys_beyond_the_mask_are_refused():
    module = llama("eager").model.layers[0].self_attn
    lazy = lazy_mask(batch_size=1, q_length=3, kv_length=3)
    q, k = torch.randn(1, 1, 3, 8), torch.randn(1, 1, 5, 8)
    with pytest.raises(UnsupportedModel, match="LlamaAttention adds keys"):
        regard_attention(module, q, k, k, lazy)


def llama(attention):
    config = tf.LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        attn_implementation=attention,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config).eval()
