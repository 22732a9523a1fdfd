"""Head tables: layout, ranking, comparison with chance, files, pictures."""

import itertools
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from regard.errors import NoSuchSite, NothingObserved, RegardError, ShapeMismatch
from regard.runtime.head_statistics import overlap, rank_correlation
from regard.runtime.head_table import HeadTable
from regard.runtime.tally import Tally

NAN = float("nan")


def ragged(**about):
    """Three sites, the middle one never observed, of 3, 2 and 1 heads."""
    return HeadTable.from_columns(
        {
            "text.2": {"sink": torch.tensor([0.5]), "range": [1.0]},
            "text.0": {"sink": [0.1, 0.9, NAN], "range": [3.0, 2.0, 1.0]},
            "text.3": {"sink": np.array([0.9, 0.2])},
        },
        about=about,
    )


def square(values, kind="text"):
    """A table of one column `x` from [layers, heads]."""
    return HeadTable.from_columns({f"{kind}.{i}": {"x": row} for i, row in enumerate(values)})


def test_rows_come_by_layer():
    table = ragged()
    assert len(table) == 6
    assert table.sites == ("text.0",) * 3 + ("text.2",) + ("text.3",) * 2
    assert table.heads.tolist() == [0, 1, 2, 0, 0, 1]
    assert table.kinds == ("text",)
    assert table["sink"].dtype == np.float64


def test_grid_pads_with_nan():
    grid = ragged().grid("sink")
    assert grid.shape == (4, 3)
    np.testing.assert_array_equal(grid[0], [0.1, 0.9, NAN])
    assert np.isnan(grid[1]).all()
    np.testing.assert_array_equal(grid[2], [0.5, NAN, NAN])
    assert np.isnan(ragged().grid("range")[3]).all()


def test_top_leaves_out_what_was_not_seen():
    table = ragged()
    assert table.top("sink", 2) == [("text.0", 1, 0.9), ("text.3", 0, 0.9)]
    assert table.top("sink", 1, largest=False) == [("text.0", 0, 0.1)]
    assert len(table.top("sink", 100)) == 5


def test_heads_are_found_by_layer_or_alias():
    table = ragged()
    assert table.at(0, 1) == {"sink": 0.9, "range": 2.0}
    assert table.at("text.0", 1) == table.at(0, 1)
    both = HeadTable.from_columns({"encoder.0": {"x": [1.0]}, "decoder.0": {"x": [2.0]}})
    assert both.kinds == ("encoder", "decoder")
    assert both.grid("x", "decoder").tolist() == [[2.0]]
    with pytest.raises(NoSuchSite, match="encoder, decoder"):
        both.grid("x")
    named = HeadTable(both.sites, both.heads, both.columns, {"main": "decoder"})
    assert named.at(0, 0) == {"x": 2.0}


def test_from_tally():
    tally = Tally()
    for layer in (0, 1):
        site = SimpleNamespace(alias=f"text.{layer}", kind="text", layer=layer, name="n")
        tally.mean(site, "entropy", torch.tensor([2.0, 4.0 * layer]), torch.tensor([2.0, 2.0]))
        if layer:
            tally.largest(site, "peak", torch.tensor([5.0, 6.0]))
    table = HeadTable.from_tally(tally, {"entropy": "entropy", "peak": "peak"}, about={"n": 1})
    assert table.grid("entropy").tolist() == [[1.0, 0.0], [1.0, 2.0]]
    np.testing.assert_array_equal(table.grid("peak"), [[NAN, NAN], [5.0, 6.0]])
    assert table.about == {"n": 1}
    with pytest.raises(NothingObserved):
        HeadTable.from_tally(Tally(), {"entropy": "entropy"})


def test_auc_counts_ties_half():
    table = square([[4.0, 3.0], [2.0, 1.0]])
    assert table.auc("x", [(0, 0), (0, 1)]) == 1.0
    assert table.auc("x", [(1, 0), ("text.1", 1)]) == 0.0
    assert square([[1.0, 1.0], [1.0, 1.0]]).auc("x", [(0, 0)]) == 0.5
    assert square([[2.0, 1.0], [1.0, 0.0]]).auc("x", [(0, 0), (0, 1)]) == 0.875
    with pytest.raises(NothingObserved, match="text.0"):
        ragged().auc("sink", [(0, 2)])
    with pytest.raises(NothingObserved, match="4 with 0"):
        table.auc("x", itertools.product(range(2), range(2)))
    with pytest.raises(NoSuchSite, match="head 7 of text.0: it has heads 0 to 1"):
        table.auc("x", [(0, 7)])


def test_rank_correlation_equals_the_textbook():
    first, second = [1.0, 2.0, 2.0, 5.0], [0.3, 0.1, 0.4, 0.4]
    one, two = np.array([1, 2.5, 2.5, 4]), np.array([2, 1, 3.5, 3.5])
    expected = np.corrcoef(one, two)[0, 1]
    assert square([first]).rank_correlation(square([second]), "x") == pytest.approx(expected)
    assert square([first]).rank_correlation(square([first]), "x") == pytest.approx(1.0)
    assert math.isnan(rank_correlation(np.ones(3), np.arange(3.0)))
    table = ragged()
    assert table.rank_correlation(table, "sink", other_column="range") == pytest.approx(-0.5)
    with pytest.raises(NothingObserved, match="share 0"):
        table.rank_correlation(square([[1.0]], kind="vision"), "sink", other_column="x")


def test_overlap_beside_chance():
    one = square([np.arange(10.0)])
    same = one.overlap(one, "x", 3)
    assert (same.shared, same.fraction, same.jaccard) == (3, 1.0, 1.0)
    assert same.expected == pytest.approx(0.9)
    assert same.p_value == pytest.approx(1 / math.comb(10, 3))
    other = one.overlap(square([-np.arange(10.0)]), "x", 3)
    assert (other.shared, other.p_value) == (0, 1.0)
    assert one.overlap(one, "x", 10).p_value == 1.0
    assert "chance 0.9" in str(same)
    with pytest.raises(RegardError, match="k=11 heads of 10"):
        one.overlap(one, "x", 11)
    with pytest.raises(RegardError, match="two filled sets"):
        overlap([], [1], 5)


def test_p_value_equals_counting_every_pair_of_sets():
    sets = list(itertools.combinations(range(6), 3))
    fixed = {0, 1, 2}
    for shared in range(4):
        other = set(list(fixed)[:shared]) | set(range(3, 6 - shared))
        share = sum(len(fixed & set(s)) >= shared for s in sets) / len(sets)
        assert overlap(fixed, other, 6).p_value == pytest.approx(share)


def test_matched_random_keeps_the_count_of_every_site():
    table = square(np.zeros((4, 6)))
    heads = [(0, 1), (0, 2), (3, 5)]
    controls = table.matched_random(heads, 20, seed=1)
    assert controls == table.matched_random(heads, 20, seed=1)
    assert controls != table.matched_random(heads, 20, seed=2)
    taken = {(f"text.{layer}", head) for layer, head in heads}
    for control in controls:
        assert [site for site, _ in control] == ["text.0", "text.0", "text.3"]
        assert len(set(control)) == 3
        assert not taken & set(control)
    with pytest.raises(RegardError, match="avoid=()"):
        table.matched_random([(0, h) for h in range(4)], 1, seed=0)
    assert len(table.matched_random([(0, h) for h in range(4)], 1, seed=0, avoid=())[0]) == 4


def test_save_and_load_keep_everything(tmp_path):
    table = ragged(lens="Sinks", tokens=12)
    table.save(tmp_path / "t.json")
    again = HeadTable.load(tmp_path / "t.json")
    assert again.names == table.names
    assert again.about == {"lens": "Sinks", "tokens": 12}
    for name in table.columns:
        np.testing.assert_array_equal(again[name], table[name])
    odd = square([[math.inf, -math.inf, NAN]])
    odd.save(tmp_path / "odd.json")
    np.testing.assert_array_equal(HeadTable.load(tmp_path / "odd.json")["x"], odd["x"])
    json.loads((tmp_path / "odd.json").read_text(), parse_constant=pytest.fail)


def test_files_that_are_no_table(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").write_text("not json")
    for name in ("a.json", "b.json"):
        with pytest.raises(RegardError, match="not a head table"):
            HeadTable.load(tmp_path / name)
    with pytest.raises(RegardError, match="cannot read"):
        HeadTable.load(tmp_path / "missing.json")
    with pytest.raises(RegardError, match="about"):
        ragged(model=object()).save(tmp_path / "c.json")
    assert not (tmp_path / "c.json").exists()


def test_csv_has_a_row_a_head(tmp_path):
    ragged().to_csv(tmp_path / "t.csv")
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert lines[0] == "site,head,sink,range"
    assert lines[1] == "text.0,0,0.1,3.0"
    assert lines[3] == "text.0,2,,1.0"
    assert str(ragged()).splitlines()[0].split() == ["site", "head", "sink", "range"]


def test_plot_is_labelled(tmp_path):
    table = ragged(model="tiny", lens="Sinks")
    figure = table.plot(path=tmp_path / "t.png")
    assert (tmp_path / "t.png").stat().st_size > 1000
    heat, bar = figure.axes
    assert (heat.get_xlabel(), heat.get_ylabel()) == ("head", "layer")
    assert bar.get_ylabel() == "sink"
    assert figure.get_suptitle() == "sink, tiny"
    both = HeadTable.from_columns({"encoder.0": {"x": [-1.0]}, "decoder.0": {"x": [2.0, 1.0]}})
    assert [axis.get_title() for axis in both.plot("x").axes[:2]] == ["encoder", "decoder"]
    with pytest.raises(RegardError, match="no column 'y'"):
        both.plot("y")
    with pytest.raises(RegardError, match="cannot write"):
        both.plot(path="/nowhere/at/all.png")


def test_plot_needs_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RegardError, match="regard\\[plot\\]"):
        ragged().plot()


def test_html_is_self_contained_and_escaped():
    page = ragged(lens="<script>alert(1)</script>", definition="a < b")._repr_html_()
    assert "<script" not in page
    assert "a &lt; b" in page
    assert "http" not in page
    assert 'title="layer 0, head 1: 0.900"' in page
    assert page.count("<details") == 2
    assert "#c8c8c8" in page


def test_wrong_shapes():
    with pytest.raises(ShapeMismatch, match="different numbers of heads"):
        HeadTable.from_columns({"text.0": {"a": [1.0], "b": [1.0, 2.0]}})
    with pytest.raises(ShapeMismatch, match="one value a head"):
        HeadTable.from_columns({"text.0": {"a": torch.zeros(2, 2)}})
    with pytest.raises(ShapeMismatch, match="two rows"):
        HeadTable(("text.0", "text.0"), np.array([0, 0]), {"a": np.zeros(2)})
    with pytest.raises(ShapeMismatch, match="one value a row"):
        HeadTable(("text.0",), np.array([0]), {"a": np.zeros(2)})
    with pytest.raises(NoSuchSite, match="layer12"):
        HeadTable.from_columns({"layer12": {"a": [1.0]}})
    with pytest.raises(RegardError, match="0 asked for"):
        ragged().top("sink", 0)
