"""Running sums, maxima and lists a site, merged and written out."""

import json

import pytest
import torch

from regard.errors import ShapeMismatch
from regard.runtime.site import Site
from regard.runtime.tally import Tally

ONE, TWO = (Site(f"layers.{i}", f"text.{i}", "text", i, torch.nn.Identity()) for i in range(2))


def filled(*numbers):
    tally = Tally()
    for n in numbers:
        tally.mean(ONE, "mean", torch.tensor([n, 2 * n]), 2)
        tally.largest(ONE, "most", torch.tensor([n, -n]))
        tally.append(TWO, "all", torch.tensor([n]))
        tally.append(TWO, "words", {"n": n})
    return tally


def test_means_maxima_and_lists():
    tally = filled(1.0, 4.0)
    assert tally.get("mean")["text.0"].tolist() == [1.25, 2.5]
    assert tally.count("mean")["text.0"] == 4
    assert tally.get("most")["text.0"].tolist() == [4.0, -1.0]
    assert [x.item() for x in tally.get("all")["text.1"]] == [1.0, 4.0]
    assert list(tally.aliases) == ["text.0", "text.1"] and tally and not Tally()


def test_a_mean_over_nothing_is_nan():
    tally = Tally()
    tally.mean(ONE, "mean", torch.zeros(2), torch.tensor([0.0, 1.0]))
    assert tally.get("mean")["text.0"].isnan().tolist() == [True, False]


def test_sums_are_exact_in_float64_and_hold_no_graph():
    tally = Tally()
    for _ in range(10_000):
        tally.mean(ONE, "mean", torch.tensor([0.1], requires_grad=True), 1)
    found = tally.get("mean")["text.0"]
    assert found.dtype == torch.float64 and not found.requires_grad
    assert abs(found.item() - float(torch.tensor(0.1))) < 1e-12


def test_merging_is_adding():
    merged, other = filled(1.0), filled(4.0, 7.0)
    before = other.export()
    merged.merge(other)
    together = filled(1.0, 4.0, 7.0)
    for name in ("mean", "most"):
        assert torch.equal(merged.get(name)["text.0"], together.get(name)["text.0"])
    assert merged.get("words") == together.get("words")
    empty = Tally()
    empty.merge(other)
    empty.mean(ONE, "mean", torch.tensor([100.0, 100.0]), 1)
    after = other.export()
    assert all(torch.equal(x, after[0][key]) for key, x in before[0].items()) and before[1] == after[1]


@pytest.mark.parametrize("how", ["add", "merge"])
def test_other_shapes_are_refused(how):
    tally, wider = filled(1.0), Tally()
    wider.mean(ONE, "mean", torch.zeros(3), 1)
    with pytest.raises(ShapeMismatch, match=r"mean had shape \(2,\) before and has \(3,\) now"):
        tally.merge(wider) if how == "merge" else tally.mean(ONE, "mean", torch.zeros(3), 1)


def test_what_is_written_out_is_read_back():
    tally = filled(1.0, 4.0)
    tensors, listing = tally.export()
    again = Tally()
    again.restore(tensors, json.loads(json.dumps(listing)))
    again.merge(filled(7.0))
    together = filled(1.0, 4.0, 7.0)
    assert torch.equal(again.get("mean")["text.0"], together.get("mean")["text.0"])
    assert again.get("words") == together.get("words") and again.aliases == together.aliases
    assert all(
        torch.equal(*pair)
        for pair in zip(again.get("all")["text.1"], together.get("all")["text.1"], strict=True)
    )
