"""Sink rates against their definition."""

import numpy as np
import pytest
import torch

import regard
from regard.errors import RegardError
from regard.lens import Sinks
from regard.runtime.protocol import Edit
from tests.lens.dense import alphas
from tests.lens.plant import HEAD, SITE, found_and_control
from tests.support.families import FAMILIES


@pytest.mark.parametrize("options", [{}, {"position": 2}, {"length": 4}, {"length": 5, "position": 1}])
def test_equals_the_dense_computation(watched, options):
    see, dense, _ = watched
    lens = Sinks(eps=(0.1, 0.3, 0.5), **options)
    result = see(lens)
    k = lens.position
    for alias, parts in dense.items():
        cut = [a[:, : lens.length, : lens.length] for a in parts]
        alpha = torch.stack([alphas(a)[:, k] for a in cut])
        rows = np.array(result.sites) == alias
        np.testing.assert_allclose(result["alpha"][rows], alpha.mean(0), rtol=1e-5)
        for eps in lens.eps:
            np.testing.assert_allclose(result[f"rate_{eps:g}"][rows], (alpha > eps).double().mean(0))
        seen = [(a > 0).any(0)[:, k] for a in cut]
        others = torch.stack(
            [(a[:, :, k].sum(1) - a[:, k, k]) / (n.sum() - 1) for a, n in zip(cut, seen, strict=True)]
        )
        np.testing.assert_allclose(result["first"][rows], others.mean(0), rtol=1e-5, atol=1e-6)
        reach = sum(n.sum() for n in seen) / sum(len(n) - k for n in seen)
        np.testing.assert_allclose(result["reach"][rows], float(reach), rtol=1e-6)
        heaviest = torch.stack([a.sum(1).argmax(1) for a in cut])
        np.testing.assert_allclose(result["heaviest_here"][rows], (heaviest == k).double().mean(0))
        weight = torch.stack(
            [alphas(a).gather(1, h[:, None])[:, 0] for a, h in zip(cut, heaviest, strict=True)]
        )
        np.testing.assert_allclose(result["heaviest_alpha"][rows], weight.mean(0), rtol=1e-5)


def test_the_threshold_comes_before_the_mean(llama):
    """One sequence at 0.5 and one at 0.2 make a rate of one half, though their mean is above 0.3."""
    ids = torch.arange(5, 25).view(2, 10)

    class Two(Edit):
        def weights(self, block):
            weights = torch.zeros_like(block.weights)
            for b, share in enumerate((0.5, 0.2)):
                rows = torch.arange(weights.shape[2])
                weights[b, :, rows, rows] = 1 - share
                weights[b, :, :, 0] += share
                weights[b, :, 0] = 0
                weights[b, :, 0, 0] = share
            return weights

    with torch.no_grad(), regard.steer(llama, Two(), Sinks()) as seen:
        llama(input_ids=ids)
    table = seen[Sinks]
    assert (table["rate_0.3"] == 0.5).all() and np.allclose(table["alpha"], 0.35)
    assert table.rate() == 0.5 and table.about["sequences"] == 2


def test_finds_a_planted_sink(llama):
    ids = torch.arange(5, 25)[None]
    found, control = found_and_control(llama, ids, Sinks(position=3), lambda i: 3 if i >= 3 else 0)
    head = found.at(SITE, HEAD)
    assert head["rate_0.3"] == 1 and head["first"] == 1 and head["heaviest"] == 3
    assert head["heaviest_here"] == 1 and control.at(SITE, HEAD)["rate_0.3"] == 0


def test_says_whether_a_bos_was_in_front(llama):
    for first, expected in ((1, 1.0), (7, 0.0)):
        with torch.no_grad(), regard.watch(llama, Sinks()) as seen:
            llama(input_ids=torch.tensor([[first, 8, 9, 10]]))
        assert seen[Sinks].bos == expected


def test_windowed_sites_are_reported_apart():
    model = FAMILIES["gemma3"].build("sdpa")
    with torch.no_grad(), regard.watch(model, Sinks()) as seen:
        model(**FAMILIES["gemma3"].inputs(model))
    table = seen[Sinks]
    assert table.windowed == ["text.0"]
    full = np.array(table.sites) == "text.1"
    assert table.rate() == table["rate_0.3"][full].mean()


def test_only_the_rows_asked_for_are_opened(llama):
    opened = []

    class Seen(Sinks):
        def weights(self, block):
            opened.append((block.start, block.stop))
            super().weights(block)

    with torch.no_grad(), regard.watch(llama, Seen(length=6)):
        llama(input_ids=torch.arange(5, 45)[None])
    assert set(opened) == {(0, 6)}


def test_the_proxy_normalises_rows(llama):
    ids = torch.arange(5, 25)[None]

    class Halve(Edit):
        def weights(self, block):
            return -0.5 * block.weights

    with torch.no_grad(), regard.watch(llama, Sinks()) as plain:
        llama(input_ids=ids)
    with torch.no_grad(), regard.steer(llama, Halve(), Sinks(proxy=True)) as halved:
        llama(input_ids=ids)
    first = np.array(plain[Sinks].sites) == "text.0"
    for column in ("alpha", "first"):
        np.testing.assert_allclose(plain[Sinks][column][first], halved[Sinks][column][first], rtol=1e-5)
    assert halved[Sinks].about["proxy"] is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": ()}, "at least one threshold"),
        ({"eps": (1.5,)}, "between 0 and 1"),
        ({"position": -1}, "counts from 0"),
        ({"position": 8, "length": 8}, "within the length"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(RegardError, match=message):
        Sinks(**options)
