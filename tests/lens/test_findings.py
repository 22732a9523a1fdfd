"""What lenses say of their numbers: the sentence, and the heads it is about."""

import numpy as np
import pytest

from regard.lens import LENSES, Entropy, Induction, MeanDistance, ResidualNorm, Sinks, ValueNorm
from regard.lens.residual_norm import ResidualNorms
from regard.lens.sinks import SinkTable
from regard.runtime.head_table import HeadTable
from regard.runtime.table import Table


def table(kind=HeadTable, about=None, **columns):
    sizes = len(next(iter(columns.values())))
    half = sizes // 2
    return kind.from_columns(
        {f"text.{i}": {n: v[i * half : (i + 1) * half] for n, v in columns.items()} for i in range(2)},
        about=about,
    )


def test_heads_above_the_bar_are_named_strongest_first():
    found = Induction.findings(table(score=[0.1, 0.5, 0.9, 0.2], chance=[0.01] * 4))
    assert [f.heads for f in found] == [(("text.1", 0), ("text.0", 1))]
    assert found[0].text == (
        "Layer 1 head 0 is the strongest of 2 induction heads: 0.90 of its attention goes to what followed "
        "the same token earlier, then layer 0 head 1 0.50; attention spread evenly would give 0.01."
    )


def test_where_none_is_above_the_bar_the_best_is_named():
    (found,) = Induction.findings(table(score=[0.1, 0.3, 0.2, 0.0], chance=[0.01] * 4))
    assert found.heads == (("text.0", 1),)
    assert found.text.startswith("No head gives over 40% ")


def test_without_numbers_it_says_so():
    (found,) = Induction.findings(table(score=[np.nan] * 4, chance=[np.nan] * 4))
    assert found.heads == () and "nothing can be said" in found.text


def test_sinks_and_their_conditions():
    about = {"eps": [0.3], "bos": 1.0}
    found = Sinks.findings(table(SinkTable, about, first=[0.9, 0.1, 0.85, 0.2], reach=[1, 1, 0.5, 0.5]))
    assert found[0].heads == (("text.0", 0), ("text.1", 0))
    assert (
        found[0].text.startswith("2 of 4 heads put over 80%")
        and "mean over all heads is 51%" in found[0].text
    )
    assert [f.text for f in found[1:]] == [
        "In 1 layer a sliding window hides the first token from some rows, which do not count there.",
        "The text began with a BOS token.",
    ]


def test_drained_values_smallest_first():
    (found,) = ValueNorm.findings(table(drain=[0.4, 1.0, 0.1, 0.6]))
    assert found.heads == (("text.1", 0), ("text.0", 0))
    assert found.text.startswith("In 2 of 4 heads")


def test_one_head_of_most_and_least():
    (found,) = Entropy.findings(table(normalised=[0.5, 0.2, 0.9, 0.4], entropy=[0.0] * 4))
    assert found.heads == (("text.0", 1), ("text.1", 0))
    (found,) = MeanDistance.findings(table(distance=[5.0, 120.0, 7.0, 9.0]))
    assert found.heads == (("text.0", 1),)
    assert found.text == (
        "The head that looks furthest is layer 0 head 1, 120 tokens away on average; the median head's is 8."
    )


@pytest.mark.parametrize(("peak", "begins"), [(50.0, "The residual stream peaks"), (1.5, "No residual peak")])
def test_residual_peaks(peak, begins):
    norms = Table({"block": ["text.0", "text.1"], "first": [1.0, 10 * peak], "largest_other": [2.0, 10.0],
                   "peak": [0.5, peak]})  # fmt: skip
    (found,) = ResidualNorm.findings(ResidualNorms(norms))
    assert found.text.startswith(begins) and "after layer 1" in found.text and found.heads == ()


@pytest.mark.parametrize("name", sorted(set(LENSES) - {"image-maps"}))
def test_findings_of_every_lens_name_it_and_heads_that_are_there(name, llama):
    import torch

    import regard

    lens = LENSES[name](name=name)
    with torch.no_grad(), regard.watch(llama, lens) as seen:
        llama(torch.arange(5, 15).repeat(1, 2))
    known = {(s.alias, h) for s in seen.sites for h in range(s.heads or 0)}
    for finding in lens.findings(seen[name]):
        assert finding.lens == name and finding.text.endswith(".")
        assert set(finding.heads) <= known
