"""Panels refuse what does not fit together, and head tables map onto one."""

import numpy as np
import pytest

from regard.errors import RegardError, ShapeMismatch
from regard.runtime.head_table import HeadTable
from regard.runtime.panels import GraphPanel, LinePanel, Link, MapPanel, Node, PatternPanel, TablePanel
from regard.runtime.table import Table


def test_a_head_table_is_a_map_of_sites_and_heads():
    values = {"text.0": {"x": [1.0, 2.0]}, "cross.0": {"x": [3.0, 4.0, -5.0]}}
    (panel,) = HeadTable.from_columns(values, about={"lens": "L", "definition": "d", "source": "s"}).panels()
    assert panel.sites == panel.rows == ["text.0", "cross.0"]
    assert panel.columns == ["0", "1", "2"] and panel.title == "L" and panel.note == "d (s)"
    np.testing.assert_array_equal(panel.values["x"], [[1, 2, np.nan], [3, 4, -5]])
    assert panel.signed("x")


MISFITS = [
    lambda: MapPanel(title="m", rows=["a"], columns=["b"], values={"x": [[1.0, 2.0]]}),
    lambda: MapPanel(title="m", rows=["a"], columns=["b"], values={"x": [[1.0]]}, sites=["s", "t"]),
    lambda: PatternPanel(site="s", head=0, weights=[[1.0]], queries=["a", "b"]),
    lambda: PatternPanel(site="s", head=0, weights=[1.0]),
    lambda: PatternPanel(site="s", head=0, weights=[[1.0]], keys=["a", "b", "c"], width=2),
    lambda: TablePanel(title="t", table=Table({"a": [1]}), heads=[]),
    lambda: LinePanel(title="l", x=[1, 2], lines={"a": [1.0]}),
]


@pytest.mark.parametrize("make", MISFITS)
def test_misfits_are_refused(make):
    with pytest.raises(ShapeMismatch):
        make()


def test_graphs_are_of_known_nodes():
    with pytest.raises(RegardError, match="same name"):
        GraphPanel(title="g", nodes=[Node("a", 0), Node("a", 1)])
    with pytest.raises(RegardError, match="'b', which is no node"):
        GraphPanel(title="g", nodes=[Node("a", 0)], links=[Link("a", "b")])


def test_pooled_tokens_fit():
    PatternPanel(site="s", head=0, weights=[[1.0, 0.0]], queries=["a"], keys=["a", "b", "c"], width=2)
