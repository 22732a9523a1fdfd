"""Column mass against its definition."""

import numpy as np
import pytest
import torch

import regard
from regard.errors import NoSuchSite, RegardError
from regard.lens import ColumnMass
from tests.lens.plant import HEAD, SITE, found_and_control


def pooled(parts, width):
    """Return mass and counts of all sequences by position, pooled over bins of `width`."""
    longest = -(-max(a.shape[1] for a in parts) // width) * width
    mass, rows = torch.zeros(parts[0].shape[0], longest), torch.zeros(longest)
    for a in parts:
        mass[:, : a.shape[1]] += a.sum(1)
        rows[: a.shape[1]] += (a > 0).any(0).sum(0)
    return mass.unflatten(1, (-1, width)).sum(2) / rows.unflatten(0, (-1, width)).sum(1)


@pytest.mark.parametrize(("bins", "width"), [(512, 1), (5, 2), (2, 8)])
def test_equals_the_dense_computation(watched, bins, width):
    see, dense, _ = watched
    result = see(ColumnMass(bins=bins))
    for alias, parts in dense.items():
        assert result.widths[alias] == width
        np.testing.assert_allclose(result.mass[alias], pooled(parts, width), rtol=1e-5, atol=1e-6)


def test_texts_of_different_length_are_pooled_together(llama):
    lens = ColumnMass(bins=8)
    with torch.no_grad(), regard.watch(llama, lens) as seen:
        for length in (5, 8, 30):
            llama(input_ids=torch.arange(5, 5 + length)[None])
    result = seen[ColumnMass]
    assert result.widths["text.0"] == 4 and result.mass["text.0"].shape == (4, 8)
    per_bin = np.array(
        [sum(max(0, n - p) for n in (5, 8, 30) for p in range(4 * b, 4 * b + 4)) for b in range(8)]
    )
    np.testing.assert_allclose((result.mass["text.0"] * per_bin).sum(1), 43, rtol=1e-5)


def test_finds_a_planted_column(llama):
    found, control = found_and_control(llama, torch.arange(5, 25)[None], ColumnMass(), lambda i: min(i, 4))
    head = found.heads.at(SITE, HEAD)
    assert head["largest_at"] == 4 and head["largest"] == 1
    assert control.heads.at(SITE, HEAD)["largest"] < 1
    assert found.of(SITE, HEAD)[5:].max() == 0


def test_bad_requests(llama):
    with pytest.raises(RegardError, match="bins is 1"):
        ColumnMass(bins=1)
    found, _ = found_and_control(llama, torch.arange(5, 9)[None], ColumnMass(), lambda i: 0)
    with pytest.raises(NoSuchSite, match="head 9 of text.0 was not observed"):
        found.of("text.0", 9)
