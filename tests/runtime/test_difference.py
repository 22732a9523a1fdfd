"""Differences of head tables and of sessions: what changed, and what changes anyway."""

import math

import pytest
import torch

import regard
from regard.errors import NothingObserved, ShapeMismatch
from regard.lens import Entropy, ResidualNorm, Sinks
from regard.runtime.difference import difference, differences
from regard.runtime.edits.scale import ScaleHeads
from regard.runtime.head_table import HeadTable
from tests.support.families import FAMILIES


def table(*values, column="score"):
    return HeadTable.from_columns({"text.0": {column: list(values)}}, about={"lens": "Planted"})


def test_a_change_and_no_change():
    found = difference(table(0.1, 0.9, 0.5), table(0.1, 0.2, 0.6))
    assert found.change("score") == pytest.approx([0, -0.7, 0.1])
    assert found.changed("score") == [("text.0", 1), ("text.0", 2)]
    same = difference(table(0.1, 0.9), table(0.1, 0.9))
    assert same.changed("score") == [] and same.quantities["heads"] == [0]


def test_a_head_counts_beyond_what_texts_do():
    noise = (table(0.0, 0.0, 0.0), table(0.2, 0.2, 0.2))
    found = difference(table(0.1, 0.9, 0.5), table(0.1, 0.2, 0.6), noise)
    assert found.noise["score"] == pytest.approx(0.2)
    assert found.changed("score") == [("text.0", 1)]


def test_quantities_hold_means_and_ranks():
    found = difference(table(0.1, 0.9, 0.5), table(0.3, 0.7, 0.5))
    (row,) = found.quantities.rows()
    assert row["before"] == pytest.approx(0.5) and row["after"] == pytest.approx(0.5)
    assert row["change"] == pytest.approx(0.4 / 3)
    assert row["heads"] == 2 and row["rank_correlation"] == pytest.approx(1)
    assert math.isnan(row["noise"])


def test_heads_that_were_not_seen_are_neither_changed_nor_counted():
    nan = float("nan")
    found = difference(table(0.1, nan, nan), table(0.4, 0.2, nan))
    assert found.changed("score") == [("text.0", 0)]
    assert found.quantities["change"] == pytest.approx([0.3])


def test_the_map_is_signed():
    (panel,) = difference(table(0.1, 0.9), table(0.5, 0.2)).panels()
    assert panel.signed("score: change")
    assert panel.values["score: change"][0] == pytest.approx([0.4, -0.7])


@pytest.mark.parametrize("other", [table(0.1), table(0.1, 0.2, column="rate")])
def test_tables_that_do_not_fit(other):
    with pytest.raises(ShapeMismatch):
        difference(table(0.1, 0.9), other)


def run(model, ids, *edits):
    lenses = (Entropy(), Sinks(), ResidualNorm())
    with torch.no_grad(), regard.watch(model, *lenses) as seen:
        if edits:
            with regard.steer(model, *edits):
                model(ids)
        else:
            model(ids)
    return seen


def test_sessions_of_a_model_and_an_edit():
    model = FAMILIES["llama"].build("sdpa")
    ids = torch.randint(5, 90, (1, 12))
    before, after = run(model, ids), run(model, ids, ScaleHeads({(0, 1): 0.0}))
    found = differences(before, after)
    assert set(found) == {"Entropy", "Sinks"}
    moved = {site for site, _ in found["Entropy"].changed("entropy")}
    assert moved == {"text.1"}  # what the first layer attends to cannot depend on its own output
    again = differences(before, run(model, ids))
    assert all(not d.changed(c) for d in again.values() for c in d.columns)


def test_other_texts_are_the_control():
    model = FAMILIES["llama"].build("sdpa")
    texts = [torch.randint(5, 90, (1, 12)) for _ in range(3)]
    sides = [run(model, ids) for ids in texts]
    plain = differences(sides[0], sides[1])["Entropy"]
    held = differences(sides[0], sides[1], (sides[1], sides[2]))["Entropy"]
    assert len(held.changed("entropy")) < len(plain.changed("entropy"))


def test_sessions_that_share_nothing():
    model = FAMILIES["llama"].build("sdpa")
    with regard.watch(model, ResidualNorm()) as seen:
        model(torch.randint(5, 90, (1, 12)))
    with pytest.raises(NothingObserved, match="share no lens"):
        differences(seen, seen)
