"""What docs/supported.md says is supported or refused: each row of it."""

import tempfile

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import regard
from regard.errors import UnsupportedModel
from regard.runtime import Edit, Lens
from regard.runtime.anatomy import anatomy_of, root_of

IDS = torch.arange(3, 21).view(2, 9)


class Rows(Lens):
    """Counts the query rows that it is shown."""

    def weights(self, block):
        self.tally.mean(block.site, "rows", torch.tensor(float(block.weights.shape[2])), 1.0)

    def result(self):
        return self.tally.get("rows")


class Sharper(Edit):
    """Doubles the scores."""

    def scores(self, block):
        return block.scores * 2


def tiny(**options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        **options,
    )
    return LlamaForCausalLM(config).eval()


def watched(model, run):
    """Logits under a lens, and how often each site was reached."""
    with regard.watch(model, Rows()) as seen:
        logits = run(IDS).logits
    assert seen.silent == []
    return logits, set(seen.called.values())


def same(model, run=None):
    run = model if run is None else run
    with torch.no_grad():
        plain = run(IDS).logits
        logits, counts = watched(model, run)
    torch.testing.assert_close(logits, plain, atol=1e-5, rtol=1e-5)
    assert counts == {1}


def test_a_model_offloaded_to_memory():
    from accelerate import cpu_offload

    model = tiny()
    cpu_offload(model, execution_device="cpu")
    same(model)


def test_a_model_offloaded_to_disk():
    from accelerate import dispatch_model

    model = tiny()
    parts = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    places = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
    with tempfile.TemporaryDirectory() as folder:
        same(dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True))


def lora():
    from peft import LoraConfig, get_peft_model

    options = LoraConfig(target_modules=["q_proj", "o_proj"], r=2, init_lora_weights=False)
    return get_peft_model(tiny(), options).eval()


def test_a_model_with_adapters():
    model = lora()
    same(model)
    arguments = {"input_ids": IDS, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(**arguments)
    with regard.watch(model, Rows()) as seen:
        assert torch.equal(model.generate(**arguments), plain)
    assert set(seen.called.values()) == {4}


def test_an_adapter_counts_in_the_output_weight():
    model = lora()
    anatomy = anatomy_of(root_of(model))
    projection = anatomy.output_projection(anatomy.site(0))
    x = torch.randn(5, 32)
    split = torch.einsum("thd,mhd->tm", x.view(5, 4, 8), anatomy.output_weight(anatomy.site(0)))
    torch.testing.assert_close(split, projection(x))


def test_a_quantised_output_weight_is_refused():
    model = torch.ao.quantization.quantize_dynamic(tiny(), {torch.nn.Linear}, dtype=torch.qint8)
    anatomy = anatomy_of(model)
    with pytest.raises(UnsupportedModel, match="quantised"):
        anatomy.output_weight(anatomy.site(0))


def test_an_offloaded_output_weight_is_refused():
    from accelerate import cpu_offload

    model = tiny()
    cpu_offload(model, execution_device="cpu")
    anatomy = anatomy_of(model)
    with pytest.raises(UnsupportedModel, match="offloaded"):
        anatomy.output_weight(anatomy.site(0))


def test_a_model_in_a_data_parallel_wrapper():
    same(torch.nn.DataParallel(tiny()))


def test_linear_layers_quantised_by_torch():
    same(torch.ao.quantization.quantize_dynamic(tiny(), {torch.nn.Linear}, dtype=torch.qint8))


def test_a_compiled_wrapper_runs_uncompiled_while_watched():
    model = tiny()
    compiled = torch.compile(model, backend="eager")
    same(model, run=compiled)
    same(compiled)


@pytest.mark.parametrize("how", ["whole", "forward", "layer", "layer wrapper"])
def test_what_is_compiled_in_place_is_refused(how):
    model = tiny()
    if how == "whole":
        model.compile(backend="eager")
    elif how == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    elif how == "layer":
        model.model.layers[1].compile(backend="eager")
    else:
        model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    with pytest.raises(UnsupportedModel, match="compiled"), regard.watch(model, Rows()):
        pass


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("stages", [[Rows()], [Sharper()], [Sharper(), Rows()]])
def test_gradient_checkpointing_keeps_gradients_and_counts_once(stages, reentrant):
    gradients = []
    for checkpointed in (False, True):
        model = tiny().train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with regard.steer(model, *stages) as seen:
            model(IDS, labels=IDS, use_cache=False).loss.backward()
        assert set(seen.called.values()) == {1}
        gradients.append([p.grad for p in model.parameters()])
    for plain, repeated in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, repeated)


def test_gradients_are_those_of_the_plain_model_while_watched():
    gradients = []
    for stages in ([], [Rows()]):
        model = tiny()
        with regard.watch(model, *stages):
            model(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, seen in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, seen)


def test_continuous_batching_is_refused():
    model = tiny(eos_token_id=0, pad_token_id=0)
    with pytest.raises(ValueError, match="continuous batching"), regard.watch(model, Rows()):
        model.generate_batch([[5, 6, 7], [8, 9]], max_new_tokens=3)


def test_a_model_without_reachable_attention_is_refused_by_name():
    layer = torch.nn.TransformerEncoderLayer(16, 2)
    with pytest.raises(UnsupportedModel, match="MultiheadAttention"):
        regard.watch(torch.nn.TransformerEncoder(layer, 2), Rows())
