"""Activation patching equals the plain loop: a forward a patch, hooks on modules, all positions."""

import re

import numpy as np
import pytest
import torch

from regard.errors import RegardError, ShapeMismatch
from regard.runtime import activation_patch
from tests.runtime.test_paths import HEADS, LAYERS, LENGTH, gpt2, llama, made, metric, mlps, neox, projections


def parts(model):
    """The blocks and the attention modules."""
    blocks = [m for n, m in model.named_modules() if re.fullmatch(r".*(layers|h)\.\d+", n)]
    return blocks, [
        m for n, m in model.named_modules() if re.search(r"\.\d+\.(self_attn|attn|attention)$", n)
    ]


class Looped:
    """What is at every place of a forward, or something else in the place of one."""

    def __init__(self, model):
        self.model, self.seen, self.put = model, {}, None
        blocks, attentions = parts(model)
        for i, module in enumerate(blocks):
            module.register_forward_pre_hook(self.before("residual", i))
        for i, module in enumerate(projections(model)):
            module.register_forward_pre_hook(self.before("head", i))
        for kind, modules in (("attention", attentions), ("mlp", mlps(model))):
            for i, module in enumerate(modules):
                module.register_forward_hook(self.after(kind, i))

    def before(self, kind, i):
        return lambda _, args: (self.meet(kind, i, args[0]), *args[1:])

    def after(self, kind, i):
        def hook(_, args, out):
            if isinstance(out, tuple):
                return (self.meet(kind, i, out[0]), *out[1:])
            return self.meet(kind, i, out)

        return hook

    def meet(self, kind, i, x):
        self.seen[kind, i] = x.clone()
        return self.put(x) if self.put and (kind, i) == self.at else x

    def run(self, ids, at=None, put=None):
        self.at, self.put = at, put
        with torch.no_grad():
            return metric(self.model(input_ids=ids, use_cache=False).logits[:, -1]).double(), dict(self.seen)


def by_loop(looped, sides, kind, layer, positions, head=None):
    """The effect over the whole change; `sides` are (ids, metric, what was seen) of base and other."""
    (base, before, _), (_, after, seen) = sides

    def put(x):
        x = x.clone()
        width = x.shape[-1] // HEADS
        part = slice(None) if head is None else slice(head * width, (head + 1) * width)
        x[:, positions, part] = seen[kind, layer][:, positions, part]
        return x

    found, _ = looped.run(base, (kind, layer), put)
    return (found - before).mean() / (after - before).mean()


@pytest.mark.parametrize(
    ("family", "direction"), [(llama, "denoise"), (llama, "noise"), (gpt2, "noise"), (neox, "denoise")]
)
def test_every_layer_at_every_position_and_every_head(family, direction):
    model, clean, corrupt = made(family)
    corrupt[:, :2] = clean[:, :2]
    found = activation_patch(
        model, {"input_ids": clean}, {"input_ids": corrupt}, metric, direction=direction,
        kinds=["residual", "attention", "mlp", "head"], heads_by_position=family is llama, rows=6,
    )  # fmt: skip
    looped = Looped(made(family)[0])
    order = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
    sides = [(ids, *looped.run(ids)) for ids in order]
    every = list(range(LENGTH))
    for layer in range(LAYERS):
        for kind in ("residual", "attention", "mlp"):
            expected = [float(by_loop(looped, sides, kind, layer, [p])) for p in every]
            np.testing.assert_allclose(found.layers[kind][layer], expected, rtol=1e-4, atol=1e-5)
        for head in range(HEADS):
            expected = float(by_loop(looped, sides, "head", layer, every, head))
            assert found.heads.at(layer, head)["effect"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
            if family is not llama:
                continue
            each = [float(by_loop(looped, sides, "head", layer, [p], head)) for p in every]
            np.testing.assert_allclose(
                found.head_positions[f"text.{layer}"][head], each, rtol=1e-4, atol=1e-5
            )
    assert (found.layers["residual"][:, :2] == 0).all() and (found.layers["mlp"][-1, :-1] == 0).all()
    assert (np.abs(found.layers["residual"][:, 2:]) > 1e-6).mean() > 0.5
    assert found.heads.about["direction"] == direction and found.prompts == 3


def test_the_whole_stream_at_the_end_is_the_whole_effect():
    model, clean, corrupt = made(llama)
    sides = {"input_ids": clean}, {"input_ids": corrupt}
    found = activation_patch(model, *sides, metric, positions=[-1, 2])
    assert found.positions == (2, LENGTH - 1)
    whole = activation_patch(model, *sides, metric, kinds=["residual"])
    np.testing.assert_allclose(
        whole.layers["residual"][:, [2, -1]], found.layers["residual"], rtol=1e-4, atol=1e-6
    )
    only_last = torch.cat([clean[:, :-1], corrupt[:, -1:]], 1)
    alone = activation_patch(model, {"input_ids": clean}, {"input_ids": only_last}, metric, direction="noise")
    np.testing.assert_allclose(alone.layers["residual"][:, -1], 1.0, rtol=1e-5)
    assert (alone.layers["residual"][:, :-1] == 0).all()


def test_a_search_that_was_stopped_goes_on(tmp_path, monkeypatch):
    model, clean, corrupt = made(llama)
    sides, path = ({"input_ids": clean}, {"input_ids": corrupt}), tmp_path / "kept.json"
    whole = activation_patch(model, *sides, metric)
    asked = []

    def stopping(logits):
        asked.append(len(logits))
        if len(asked) == 20:
            raise KeyboardInterrupt
        return metric(logits)

    with pytest.raises(KeyboardInterrupt):
        activation_patch(model, *sides, stopping, save=path)
    torch.testing.assert_close(model(input_ids=clean).logits, made(llama)[0](input_ids=clean).logits)
    asked = [0] * 100
    again = activation_patch(model, *sides, stopping, save=path)
    patches = 3 * LAYERS * LENGTH - 2 * (LENGTH - 1)
    assert len(asked) - 100 == 2 + patches - (20 - 1 - 2)
    for kind, values in whole.layers.items():
        np.testing.assert_allclose(again.layers[kind], values, rtol=1e-5, atol=1e-7)
    asked = [0] * 100
    activation_patch(model, *sides, stopping, save=path)
    assert len(asked) == 102
    with pytest.raises(RegardError, match="of another model or metric"):
        activation_patch(model, *sides, lambda logits: 2 * metric(logits), save=path)
    path.write_text("{}")
    with pytest.raises(RegardError, match="holds no search that regard kept"):
        activation_patch(model, *sides, metric, save=path)
    with pytest.raises(RegardError, match="cannot write"):
        activation_patch(model, *sides, metric, save=tmp_path / "none" / "kept.json")


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"kinds": ["residue"]}, RegardError, "it must name some of residual"),
        ({"kinds": "mlp"}, RegardError, "kinds is 'mlp'"),
        ({"direction": "back"}, RegardError, "denoise, noise"),
        ({"positions": [7]}, RegardError, "some of the 7 tokens"),
        ({"positions": [6, -1]}, RegardError, "each once"),
        ({"corrupt": "clean"}, RegardError, "nothing to explain"),
        ({"corrupt": "shorter"}, ShapeMismatch, "must answer to each other"),
    ],
)
def test_bad_input(changed, error, said):
    model, clean, corrupt = made(llama)
    other = {"clean": clean, "shorter": corrupt[:, 1:]}.get(changed.pop("corrupt", ""), corrupt)
    with pytest.raises(error, match=re.escape(said)):
        activation_patch(model, {"input_ids": clean}, {"input_ids": other}, metric, **changed)
