"""Path patching equals its definition written out: a forward a sender, hooks on modules, all positions."""

import re

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from regard.errors import NoSuchSite, RegardError, ShapeMismatch, UnsupportedModel
from regard.runtime.paths import halves_agree, path_patch

HEADS, LAYERS, LENGTH = 4, 3, 7


def llama():
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2():
    config = GPT2Config(
        vocab_size=50, n_embd=32, n_layer=LAYERS, n_head=HEADS, bos_token_id=None, eos_token_id=None
    )
    return GPT2LMHeadModel(config)


def neox():
    config = GPTNeoXConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config)


def made(family):
    torch.manual_seed(1)
    model = family().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.0, 0.25)
    clean = torch.randint(3, 50, (3, LENGTH))
    corrupt = torch.where(torch.rand(3, LENGTH) < 0.5, torch.randint(3, 50, (3, LENGTH)), clean)
    return model.double(), clean, corrupt


def metric(logits):
    return logits[:, 4] - logits[:, 9]


def projections(model):
    names = ("self_attn.o_proj", "attn.c_proj", "attention.dense")
    return [m for n, m in model.named_modules() if n.endswith(names)]


def mlps(model):
    return [m for n, m in model.named_modules() if re.search(r"\.\d+\.mlp$", n)]


class Recorder:
    """Inputs of projections and outputs of MLPs of a forward, or others in their place."""

    def __init__(self, model):
        self.model, self.z, self.m = model, {}, {}
        self.put_z, self.put_m = {}, {}
        for i, module in enumerate(projections(model)):
            module.register_forward_pre_hook(lambda _, x, i=i: self._z(i, x))
        for i, module in enumerate(mlps(model)):
            module.register_forward_hook(lambda _, x, out, i=i: self._m(i, out))

    def _z(self, i, x):
        z = self.put_z[i](x[0]) if i in self.put_z else x[0]
        self.z[i] = z.clone()
        return (z,)

    def _m(self, i, out):
        out = self.put_m[i](out) if i in self.put_m else out
        self.m[i] = out.clone()
        return out

    def run(self, ids):
        with torch.no_grad():
            logits = self.model(input_ids=ids, use_cache=False).logits[:, -1]
        return logits, dict(self.z), dict(self.m)


def by_definition(model, clean, corrupt, sender, position, freeze):
    """The metric after step 1: `sender` is (layer, head), or (layer, None) for its MLP."""
    recorder = Recorder(model)
    base, z, m = recorder.run(clean)
    _, other_z, other_m = recorder.run(corrupt)
    layer, head = sender
    width = z[0].shape[-1] // HEADS
    for i in range(LAYERS):

        def put(x, i=i):
            x = x.clone()
            x[:, position] = z[i][:, position]
            if i == layer and head is not None:
                part = slice(head * width, (head + 1) * width)
                x[:, position, part] = other_z[i][:, position, part]
            return x

        recorder.put_z[i] = put
        if freeze or (i == layer and head is None):
            source = other_m[i] if i == layer and head is None else m[i]

            def put_m(x, source=source):
                x = x.clone()
                x[:, position] = source[:, position]
                return x

            recorder.put_m[i] = put_m
    return metric(recorder.run(clean)[0]) - metric(base)


@pytest.mark.parametrize(
    ("family", "freeze", "rows"),
    [
        (llama, False, 6),
        (llama, True, 1),
        (gpt2, False, 6),
        (gpt2, True, 6),
        (neox, False, 1),
        (neox, True, 6),
    ],
)
def test_effects_on_the_logits(family, freeze, rows):
    model, clean, corrupt = made(family)
    found = path_patch(
        model, {"input_ids": clean}, {"input_ids": corrupt}, metric, freeze_mlps=freeze, mlps=True, rows=rows
    )
    for row, sender in enumerate((i, h) for i in range(LAYERS) for h in range(HEADS)):
        expected = by_definition(made(family)[0], clean, corrupt, sender, -1, freeze)
        torch.testing.assert_close(found.each[row].double(), expected, rtol=1e-4, atol=1e-5)
    for i in range(LAYERS):
        expected = by_definition(made(family)[0], clean, corrupt, (i, None), -1, freeze)
        assert found.mlps[f"text.{i}"] == pytest.approx(float(expected.mean()), rel=1e-3, abs=1e-5)
    assert len({round(float(x), 6) for x in found.each.flatten()}) > LAYERS * HEADS


def received(model, clean, corrupt, sender, position, component, receivers):
    """The metric after step 2, the model's own projections given what step 1 made of them."""
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    layers = model.model.layers
    recorder = Recorder(model)
    base, z, _ = recorder.run(clean)
    _, other_z, _ = recorder.run(corrupt)
    layer, head = sender
    kept = {}
    handles = [
        getattr(layers[i].self_attn, names[component]).register_forward_hook(
            lambda _, x, out, i=i: kept.__setitem__(i, out.clone())
        )
        for i, _ in receivers
    ]
    for i in range(LAYERS):

        def put(x, i=i):
            x = x.clone()
            x[:, position] = z[i][:, position]
            if i == layer:
                x[:, position, head * 8 : head * 8 + 8] = other_z[i][:, position, head * 8 : head * 8 + 8]
            return x

        recorder.put_z[i] = put
    recorder.run(clean)
    for handle in handles:
        handle.remove()
    recorder.put_z.clear()
    group = 1 if component == "query" else 2
    for i, receiver in receivers:
        own = receiver // group

        def give(_, x, out, i=i, own=own):
            out = out.clone()
            out[:, position, own * 8 : own * 8 + 8] = kept[i][:, position, own * 8 : own * 8 + 8]
            return out

        getattr(layers[i].self_attn, names[component]).register_forward_hook(give)
    return metric(recorder.run(clean)[0]) - metric(base)


@pytest.mark.parametrize("position", [-1, 3])
@pytest.mark.parametrize("component", ["query", "key", "value"])
def test_effects_through_receivers(component, position):
    model, clean, corrupt = made(llama)
    receivers = [(1, 1), (2, 3)]
    found = path_patch(
        model, {"input_ids": clean}, {"input_ids": corrupt}, metric, receivers=receivers, component=component,
        position=position, rows=9,
    )  # fmt: skip
    for row, sender in enumerate((i, h) for i in range(LAYERS) for h in range(HEADS)):
        if sender[0] == 2:
            assert found.each[row].isnan().all()
            continue
        expected = received(made(llama)[0], clean, corrupt, sender, position, component, receivers)
        torch.testing.assert_close(found.each[row].double(), expected, rtol=1e-3, atol=1e-5)
    if component != "query" or position == -1:
        assert float(found.each[:4].abs().max()) > 1e-4


def test_the_model_is_as_before_and_the_table_says_what_it_is():
    model, clean, corrupt = made(llama)
    before = model(input_ids=clean).logits.detach()
    found = path_patch(model, {"input_ids": clean}, {"input_ids": corrupt}, metric)
    assert torch.equal(model(input_ids=clean).logits, before)
    assert found.heads.about["prompts"] == 3
    assert found.clean == pytest.approx(float(metric(before[:, -1]).mean()), rel=1e-5)
    gap = found.corrupt - found.clean
    assert found.heads["normalised"].tolist() == pytest.approx((found.heads["effect"] / gap).tolist())


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"component": "output"}, RegardError, "component is 'output'"),
        ({"receivers": []}, RegardError, "receivers is empty"),
        ({"receivers": [(9, 0)]}, NoSuchSite, "no layer 9"),
        ({"receivers": [(1, 9)]}, NoSuchSite, "no head 9"),
        ({"position": 2}, RegardError, "the last for the logits"),
        ({"position": 70, "receivers": [(1, 1)]}, RegardError, "must be one of the 7 tokens"),
        ({"corrupt": "shorter"}, ShapeMismatch, "must answer to each other"),
        ({"corrupt": "clean"}, RegardError, "nothing to explain"),
        ({"corrupt": "padded"}, RegardError, "corrupt is padded"),
        ({"metric": lambda logits: logits}, ShapeMismatch, "the metric gave (3, 50) for 3 prompts"),
    ],
)
def test_bad_input(changed, error, said):
    model, clean, corrupt = made(llama)
    sides = {
        "shorter": {"input_ids": corrupt[:, 1:]},
        "clean": {"input_ids": clean},
        "padded": {"input_ids": corrupt, "attention_mask": (corrupt > corrupt.min()).long()},
    }
    options = dict(changed)
    other = sides.get(options.pop("corrupt", None), {"input_ids": corrupt})
    scored = options.pop("metric", metric)
    with pytest.raises(error, match=re.escape(said)):
        path_patch(model, {"input_ids": clean}, other, scored, **options)


@pytest.mark.parametrize("family", [llama, gpt2, neox])
def test_the_closed_form_is_the_run_with_mlps_held(family):
    model, clean, corrupt = made(family)
    sides = {"input_ids": clean}, {"input_ids": corrupt}
    ran = path_patch(model, *sides, metric, freeze_mlps=True, mlps=True)
    for tokens in (None, torch.tensor([4, 9])):
        found = path_patch(model, *sides, metric, exact=False, mlps=True, tokens=tokens)
        torch.testing.assert_close(found.each, ran.each, rtol=1e-4, atol=1e-5)
        assert found.mlps == pytest.approx(ran.mlps, rel=1e-4, abs=1e-5)
    through = {"receivers": [(1, 1), (2, 3)], "component": "value", "position": 4}
    ran = path_patch(model, *sides, metric, freeze_mlps=True, mlps=True, **through)
    found = path_patch(model, *sides, metric, exact=False, mlps=True, **through)
    torch.testing.assert_close(found.each, ran.each, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert float(found.each[:8].abs().max()) > 1e-4 and found.each[8:].isnan().all()


def test_where_there_is_no_closed_form():
    model, clean, corrupt = made(llama)
    sides = {"input_ids": clean}, {"input_ids": corrupt}
    for block in model.model.layers:
        block.self_attn.register_forward_hook(lambda _, x, out: (2 * out[0], *out[1:]))
    with pytest.raises(UnsupportedModel, match="no closed form; use exact=True"):
        path_patch(model, *sides, metric, exact=False)
    with pytest.raises(UnsupportedModel, match="no closed form"):
        path_patch(model, *sides, metric, exact=False, receivers=[(2, 1)])
    model = made(llama)[0]
    model.model.norm = torch.nn.Identity().eval()
    with pytest.raises(UnsupportedModel, match="has no final norm that regard can find"):
        path_patch(model, *sides, metric, exact=False)


def test_holding_queries_keys_and_values_is_holding_heads():
    """As Wang et al.'s code does it: all q, k, v of the clean run, at all positions."""
    model, clean, corrupt = made(llama)
    found = path_patch(model, {"input_ids": clean}, {"input_ids": corrupt}, metric)
    recorder = Recorder(model)
    base, _, _ = recorder.run(clean)
    _, other_z, _ = recorder.run(corrupt)
    kept = {}
    modules = [m for n, m in model.named_modules() if n.endswith(("q_proj", "k_proj", "v_proj"))]
    handles = [m.register_forward_hook(lambda m, x, out: kept.__setitem__(m, out.clone())) for m in modules]
    recorder.run(clean)
    [handle.remove() for handle in handles]
    [m.register_forward_hook(lambda m, x, out: kept[m]) for m in modules]
    for row, (layer, head) in enumerate((i, h) for i in range(LAYERS) for h in range(HEADS)):

        def put(x, layer=layer, head=head):
            x = x.clone()
            x[:, -1, head * 8 : head * 8 + 8] = other_z[layer][:, -1, head * 8 : head * 8 + 8]
            return x

        recorder.put_z = {layer: put}
        expected = metric(recorder.run(clean)[0]) - metric(base)
        torch.testing.assert_close(found.each[row].double(), expected, rtol=1e-4, atol=1e-5)


def test_a_search_that_was_stopped_goes_on(tmp_path):
    model, clean, corrupt = made(llama)
    sides, path = ({"input_ids": clean}, {"input_ids": corrupt}), tmp_path / "kept.json"
    options = {"receivers": [(2, 1)], "rows": 3}
    whole, asked = path_patch(model, *sides, metric, **options), []

    def stopping(logits):
        asked.append(len(logits))
        if len(asked) == 6:
            raise KeyboardInterrupt
        return metric(logits)

    with pytest.raises(KeyboardInterrupt):
        path_patch(model, *sides, stopping, save=path, **options)
    again = path_patch(model, *sides, stopping, save=path, **options)
    assert len(asked) == 6 + 2 + 2 * HEADS - (6 - 1 - 2)
    torch.testing.assert_close(again.each, whole.each, equal_nan=True, rtol=1e-5, atol=1e-6)
    other = path_patch(model, *sides, metric, receivers=[(1, 1)], save=path)
    assert not torch.equal(other.each[:4], whole.each[:4])
    assert whole.stability == pytest.approx(halves_agree(whole.each)) and -1 <= whole.stability <= 1


def test_how_far_two_halves_of_prompts_agree():
    torch.manual_seed(0)
    signal, noise = torch.randn(50, 1), torch.randn(50, 20)
    assert halves_agree(signal + 0.1 * noise) > 0.9 > 0.4 > abs(halves_agree(noise))
    holes = torch.cat([signal + 0.1 * noise, torch.full((3, 20), torch.nan)])
    assert halves_agree(holes) == halves_agree(signal + 0.1 * noise)
    assert halves_agree(signal) != halves_agree(signal)
