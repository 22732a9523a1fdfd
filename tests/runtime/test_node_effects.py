"""Patched nodes equal hooks on modules; a direct path is the final norm applied to a changed stream."""

import re

import pytest
import torch

from regard.errors import RegardError, ShapeMismatch
from regard.runtime.node_effects import net_logit, node_effects
from tests.runtime.test_paths import gpt2, llama, made, neox

ANSWERS = torch.tensor([[4, 9, 11], [5, 8, 12], [6, 7, 13]])
PARTS = {
    llama: ("model.layers", "self_attn.o_proj", "mlp", "model.norm"),
    gpt2: ("transformer.h", "attn.c_proj", "mlp", "transformer.ln_f"),
    neox: ("gpt_neox.layers", "attention.dense", "mlp", "gpt_neox.final_layer_norm"),
}


def watched(model, ids, names):
    """What goes into or comes out of modules at the last position, and the last logits."""
    kept, handles = {}, []
    for name, side in names:

        def keep(module, given, out, key=(name, side)):
            x = given[0] if key[1] == "in" else out
            kept[key] = (x[0] if isinstance(x, tuple) else x)[:, -1].clone()

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, -1]
    for handle in handles:
        handle.remove()
    return kept, logits


def patched(model, ids, name, side, change):
    """The last logits, with `change` made to what a module gets or gives at the last position."""

    def before(module, given):
        x = given[0].clone()
        x[:, -1] = change(x[:, -1])
        return (x, *given[1:])

    def after(module, given, out):
        x = (out[0] if isinstance(out, tuple) else out).clone()
        x[:, -1] = change(x[:, -1])
        return (x, *out[1:]) if isinstance(out, tuple) else x

    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(before) if side == "in" else module.register_forward_hook(after)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, -1]
    handle.remove()
    return logits


@pytest.mark.parametrize("family", [llama, gpt2, neox])
def test_effects_are_those_of_hooks(family):
    model, clean, corrupt = made(family)
    blocks, projection, mlp, norm = PARTS[family]
    found = node_effects(model, {"input_ids": clean}, {"input_ids": corrupt[:, 1:]}, ANSWERS, rows=9)
    heads = f"{blocks}.1.{projection}"
    other, _ = watched(model, corrupt[:, 1:], [(heads, "in"), (f"{blocks}.1.{mlp}", "out")])
    own, logits = watched(model, clean, [(heads, "in"), (f"{blocks}.1.{mlp}", "out"), (norm, "in")])
    before = net_logit(logits, ANSWERS)

    def swapped(x):
        return torch.cat([x[:, :8], other[heads, "in"][:, 8:16], x[:, 16:]], 1)

    after = net_logit(patched(model, clean, heads, "in", swapped), ANSWERS)
    total = float((after - before).mean())
    assert (
        found.heads.at("text.1", 1)["total"] == pytest.approx(total, rel=1e-4, abs=1e-6) and abs(total) > 1e-5
    )
    key = f"{blocks}.1.{mlp}", "out"
    after = net_logit(patched(model, clean, key[0], "out", lambda x: other[key]), ANSWERS)
    assert found.mlps["text.1"][0] == pytest.approx(float((after - before).mean()), rel=1e-4, abs=1e-6)

    @torch.no_grad()
    def direct(change):
        made = model.get_output_embeddings()(model.get_submodule(norm)(own[norm, "in"] + change))
        return float((net_logit(made, ANSWERS) - before).mean())

    weight = model.get_submodule(heads).weight
    weight = weight.T if family is gpt2 else weight
    change = (other[heads, "in"] - own[heads, "in"])[:, 8:16] @ weight[:, 8:16].T
    assert found.heads.at("text.1", 1)["direct"] == pytest.approx(direct(change), rel=1e-4, abs=1e-6)
    assert found.mlps["text.1"][1] == pytest.approx(direct(other[key] - own[key]), rel=1e-4, abs=1e-6)
    assert found.clean == pytest.approx(float(before.mean()), rel=1e-5)
    last = found.heads.grid("total")[-1], found.heads.grid("direct")[-1]
    assert family is neox or abs(last[0] - last[1]).max() > 0


def test_bad_input():
    model, clean, corrupt = made(llama)
    for given, answers, kind, said in (
        (corrupt[:2], ANSWERS, ShapeMismatch, "3 clean and 2 corrupt"),
        (corrupt, ANSWERS[0], ShapeMismatch, "answers are [3]"),
        (corrupt, ANSWERS[:, :1], RegardError, "two answers at least"),
    ):
        with pytest.raises(kind, match=re.escape(said)):
            node_effects(model, {"input_ids": clean}, {"input_ids": given}, answers)
