"""Tables print, render and write what they hold."""

import csv
import json
import os
import sys

import pytest
import torch

from regard.errors import RegardError, ShapeMismatch
from regard.runtime.table import Table, shown


def sample():
    return Table({"site": ["text.0", "<b>"], "mass": torch.tensor([0.5, float("nan")]), "n": [3, 12]})


def test_text_is_aligned_and_plain():
    text = str(sample())
    assert "\x1b" not in text
    header, _, first, second = text.splitlines()
    assert header.split() == ["site", "mass", "n"]
    assert first.split() == ["text.0", "0.500", "3"]
    assert second.split() == ["<b>", "-", "12"]
    assert len(first) == len(second)


def test_square_brackets_are_kept():
    assert "[bold]" in str(Table({"a": ["[bold]"]}))


def test_html_is_escaped():
    html = sample()._repr_html_()
    assert "&lt;b&gt;" in html
    assert "<b>" not in html


def test_long_tables_are_cut_in_notebooks_only():
    table = Table({"a": range(1000)})
    assert "800 more rows" in table._repr_html_()
    assert len(str(table).splitlines()) == 1002


def test_rows_and_columns():
    assert [row["n"] for row in sample().rows()] == [3, 12]
    assert sample()["n"] == [3, 12]
    assert len(sample()) == 2
    assert len(Table({})) == 0


def test_csv_and_json(tmp_path):
    sample().to_csv(tmp_path / "t.csv")
    with open(tmp_path / "t.csv", newline="") as file:
        assert list(csv.reader(file)) == [
            ["site", "mass", "n"],
            ["text.0", "0.5", "3"],
            ["<b>", "", "12"],
        ]
    text = sample().to_json(tmp_path / "t.json")
    assert json.loads(text) == json.loads((tmp_path / "t.json").read_text())
    assert json.loads(text)[1] == {"site": "<b>", "mass": None, "n": 12}


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "t.csv").write_text("old")

    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(RegardError, match="No space left"):
        sample().to_csv(tmp_path / "t.csv")
    assert [p.name for p in tmp_path.iterdir()] == ["t.csv"]
    assert (tmp_path / "t.csv").read_text() == "old"


def test_wrong_use():
    with pytest.raises(ShapeMismatch, match="'b': 1"):
        Table({"a": [1, 2], "b": [1]})
    with pytest.raises(RegardError, match="the table has site, mass, n"):
        sample()["weight"]
    with pytest.raises(RegardError, match="nowhere"):
        sample().to_csv("/nowhere/at/all.csv")


def test_pandas_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(RegardError, match="pip install pandas"):
        sample().to_pandas()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.25, "0.250"),
        (0.0, "0.000"),
        (0.0001, "0.0001"),
        (12345.678, "1.23e+04"),
        (2048.0, "2048"),
        (7, "7"),
        (None, "-"),
        (float("nan"), "-"),
        (float("inf"), "inf"),
        (True, "True"),
    ],
)
def test_numbers_are_short(value, text):
    assert shown(value) == text
