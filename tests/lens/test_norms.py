"""Norms of values, head outputs and the residual stream, against naive computations."""

import numpy as np
import pytest
import torch

import regard
from regard.lens import HeadOutputNorm, ResidualNorm, ValueNorm
from regard.runtime.anatomy import anatomy_of
from regard.runtime.protocol import Lens
from tests.support.families import FAMILIES


class Raw(Lens):
    """Keeps values and head outputs as they are."""

    def inputs(self, call):
        self.tally.append(call.site, "v", call.expand()[1].double())

    def head_outputs(self, call):
        self.tally.append(call.site, "out", call.head_outputs.double())

    def result(self):
        return self.tally


def naive(model, inputs):
    """Return alias -> norms [B, H, T] of projected values and of projected head outputs."""
    with torch.no_grad(), regard.watch(model, Raw()) as seen:
        model(**inputs)
    anatomy = anatomy_of(model)
    found = {}
    for alias in seen[Raw].aliases:
        weight = anatomy.output_weight(anatomy.site(alias)).double()
        found[alias] = [
            torch.einsum("dhe,bhte->bhtd", weight, seen[Raw].get(name)[alias][0]).norm(dim=-1)
            for name in ("v", "out")
        ]
    return found


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "deepseek", "gpt-oss"])
def test_equal_the_naive_norms(family, padding):
    model = FAMILIES[family].build("eager")
    inputs = FAMILIES[family].inputs(model, padding)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    with torch.no_grad(), regard.watch(model, ValueNorm(), HeadOutputNorm()) as seen:
        model(**inputs)
    with torch.no_grad():
        expected = naive(model, inputs)
    for alias, (values, outputs) in expected.items():
        each = [v[:, keep] for v, keep in zip(values, real, strict=True)]
        first = torch.stack([v[:, 0] for v in each])
        others = torch.stack([v[:, 1:].mean(1) for v in each])
        table = seen[ValueNorm]
        rows = np.array(table.sites) == alias
        np.testing.assert_allclose(table["first"][rows], first.mean(0), rtol=1e-5)
        np.testing.assert_allclose(table["others"][rows], others.mean(0), rtol=1e-5)
        np.testing.assert_allclose(table["drain"][rows], (first / others).mean(0), rtol=1e-5)
        written = torch.cat([o[:, keep] for o, keep in zip(outputs, real, strict=True)], 1)
        np.testing.assert_allclose(seen[HeadOutputNorm]["norm"][rows], written.mean(1), rtol=1e-5)
        np.testing.assert_allclose(seen[HeadOutputNorm]["largest"][rows], written.amax(1), rtol=1e-5)


def test_a_changed_projection_is_noticed(llama):
    ids = torch.arange(5, 15)[None]
    model = FAMILIES["llama"].build("sdpa")
    tables = []
    for factor in (1.0, 2.0):
        with torch.no_grad():
            model.model.layers[0].self_attn.o_proj.weight.mul_(factor)
            with regard.watch(model, ValueNorm()) as seen:
                model(input_ids=ids)
        tables.append(seen[ValueNorm]["first"][:4])
    np.testing.assert_allclose(tables[1], 2 * tables[0], rtol=1e-5)


def test_finds_a_drained_value(llama):
    """Doubling every value but the first one's halves the drain."""
    ids = torch.arange(5, 15)[None]

    class Double(regard.Edit):
        def inputs(self, call):
            v = call.v * 2
            v[:, :, 0] /= 2
            return call.q, call.k, v

    with torch.no_grad(), regard.steer(llama, Double(), ValueNorm()) as seen:
        llama(input_ids=ids)
    with torch.no_grad(), regard.watch(llama, ValueNorm()) as plain:
        llama(input_ids=ids)
    first = np.array(plain[ValueNorm].sites) == "text.0"
    np.testing.assert_allclose(
        2 * seen[ValueNorm]["drain"][first], plain[ValueNorm]["drain"][first], rtol=1e-5
    )


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_residual_norms_equal_those_of_the_hidden_states(llama, padding):
    inputs = FAMILIES["llama"].inputs(llama, padding)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    caught = []
    hooks = [
        layer.register_forward_hook(
            lambda m, a, out: caught.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in llama.model.layers
    ]
    with torch.no_grad():
        llama(**inputs)
    for hook in hooks:
        hook.remove()
    with torch.no_grad(), regard.watch(llama, ResidualNorm()) as seen:
        llama(**inputs)
    table = seen[ResidualNorm].table
    for layer, hidden in enumerate(caught):
        norms = [h[keep].norm(dim=-1) for h, keep in zip(hidden, real, strict=True)]
        first = torch.stack([n[0] for n in norms])
        largest = torch.stack([n[1:].max() for n in norms])
        assert table["block"][layer] == f"text.{layer}"
        np.testing.assert_allclose(table["first"][layer], first.mean(), rtol=1e-5)
        np.testing.assert_allclose(table["others"][layer], sum(n[1:].mean() for n in norms) / 2, rtol=1e-5)
        np.testing.assert_allclose(table["largest_other"][layer], largest.mean(), rtol=1e-5)
        np.testing.assert_allclose(table["peak"][layer], (first / largest).mean(), rtol=1e-5)
        best = norms[int(largest.argmax())]
        assert table["largest_other_at"][layer] == int(best[1:].argmax()) + 1


def test_residual_norms_plot_and_save(llama, tmp_path):
    with torch.no_grad(), regard.watch(llama, ResidualNorm()) as seen:
        llama(input_ids=torch.arange(5, 15)[None])
    result = seen[ResidualNorm]
    result.plot(tmp_path / "norms.png")
    result.save(tmp_path / "norms.json")
    assert (tmp_path / "norms.png").stat().st_size and (tmp_path / "norms.json").stat().st_size
    with pytest.raises(regard.errors.RegardError, match="cannot write"):
        result.plot(tmp_path / "no" / "norms.png")
