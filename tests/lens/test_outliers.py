"""Outliers: the official formulas on whole tensors, a planted outlier and a control, and what is refused."""

import numpy as np
import pytest
import torch

import regard
from regard.errors import RegardError
from regard.lens import Outliers
from tests.support.families import FAMILIES


def official(x):
    """Infinity norm and kurtosis of each row of x [B, d], as the paper's code computes them."""
    mean, std = x.mean(1, keepdim=True), x.std(1)
    return x.abs().amax(1), ((x - mean) ** 4).mean(1) / (std**4 + 1e-6)


def handed(model, inputs):
    """What blocks, attention and MLPs hand on, name -> [layer][B, T, D]."""
    found = {"residual": [], "attention": [], "mlp": []}
    hooks = []
    for layer in model.model.layers:
        for name, module in (
            ("residual", layer), ("attention", layer.self_attn.o_proj), ("mlp", layer.mlp),
        ):  # fmt: skip
            hooks.append(
                module.register_forward_hook(
                    lambda m, a, out, name=name: found[name].append(out[0] if isinstance(out, tuple) else out)
                )
            )
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return found


def measured(model, inputs, **options):
    with torch.no_grad(), regard.watch(model, Outliers(**options)) as seen:
        model(**inputs)
    return seen[Outliers]


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_equal_the_official_formulas(padding):
    model = FAMILIES["llama"].build()
    inputs = FAMILIES["llama"].inputs(model, padding)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    report, found = measured(model, inputs, without=[0, 2]), handed(model, inputs)
    for tensor, layers in found.items():
        for name, out in (("", []), ("_rest", [0, 2])):
            for layer, x in enumerate(layers):
                rows = [h[keep].double() for h, keep in zip(x, real, strict=True)]
                kept = [r[[i for i in range(len(r)) if i not in out]].flatten()[None] for r in rows]
                both = [official(r) for r in kept]
                for column, values in zip(("infinity", "kurtosis"), zip(*both, strict=True), strict=True):
                    expected = float(torch.cat(values).mean())
                    value = report.lines(column + name, tensor)[1][layer]
                    assert value == pytest.approx(expected, rel=1e-5)


def test_a_planted_outlier_is_found_and_leaves_with_its_token():
    model = FAMILIES["llama"].build()
    inputs = {"input_ids": torch.arange(5, 15)[None]}

    class Plant(regard.Edit):
        def points(self, anatomy):
            return [regard.Point("residual", layer=0)]

        def hidden(self, point, x, run):
            x = x.clone()
            x[:, 0, 7] = 500.0
            return x

    plain = measured(model, inputs)
    with torch.no_grad(), regard.steer(model, Plant(), Outliers()) as seen:
        model(**inputs)
    report = seen[Outliers]
    assert report.lines("infinity")[1][0] == 500 and report.lines("kurtosis")[1][0] > 100
    np.testing.assert_allclose(report.lines("kurtosis_rest")[1][0], plain.lines("kurtosis_rest")[1][0])
    row = report.table["block"].index("text.0")
    assert report.table["largest_channel"][row] == 7 and report.table["largest_at_first"][row] == 1
    assert report.table["largest_channel_share"][row] == 1
    assert "after layer" in Outliers.findings(report)[0].text.lower() and plain.worst("kurtosis") < 20
    assert Outliers.findings(plain)[0].text.startswith("No outliers")


def test_a_normal_distribution_has_three():
    torch.manual_seed(0)
    model = FAMILIES["llama"].build()

    class Noise(regard.Edit):
        def points(self, anatomy):
            return [regard.Point("residual", layer=1)]

        def hidden(self, point, x, run):
            return torch.randn_like(x) + 2

    ids = torch.randint(5, 90, (4, 100))
    with torch.no_grad(), regard.steer(model, Noise(), Outliers(tensors=["residual"])) as seen:
        model(input_ids=ids)
    assert seen[Outliers].lines("kurtosis")[1][1] == pytest.approx(3, abs=0.15)


def test_it_is_drawn_saved_and_read_by_name(tmp_path):
    model = FAMILIES["llama"].build()
    report = measured(model, FAMILIES["llama"].inputs(model))
    report.plot(tmp_path / "outliers.png")
    report.save(tmp_path / "outliers.json")
    assert (tmp_path / "outliers.png").stat().st_size and (tmp_path / "outliers.json").stat().st_size
    assert len(report.panels()) == 2 and report.worst("infinity", "") >= report.worst("infinity")
    with pytest.raises(RegardError, match="columns are infinity"):
        report.worst("size")


@pytest.mark.parametrize(
    ("options", "words"),
    [({"without": [-1]}, "count from 0"), ({"tensors": ["logits"]}, "residual, attention, mlp"),
     ({"tensors": []}, "takes some of")],
)  # fmt: skip
def test_wrong_options_are_refused(options, words):
    with pytest.raises(RegardError, match=words):
        Outliers(**options)
