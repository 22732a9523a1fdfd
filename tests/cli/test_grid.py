"""Maps as text: numbers where they fit, else shades; nothing wider than there is room for."""

import numpy as np
import pytest

from regard.cli.grid import PLAIN_SHADES, SHADES, grid

NAN = float("nan")


def lines(values, percent=True, width=None, shades=SHADES):
    return [line.plain for line in grid(np.array(values), percent=percent, width=width, shades=shades)]


def test_per_cent():
    assert lines([[0.0, 0.5], [1.0, 0.066]]) == [
        " layer   h0  h1",
        "     0    0  50",
        "     1  100   7",
    ]


def test_numbers_have_the_decimals_that_the_largest_needs():
    assert lines([[22704.2, 3.0]], percent=False)[1] == "     0  22704     3"
    assert lines([[0.0123, -0.002]], percent=False)[1] == "     0   0.0123 -0.0020"
    assert lines([[0.0, 0.0]], percent=False)[1] == "     0  0.0 0.0"


def test_what_was_not_seen_is_a_dash_and_a_layer_without_anything_is_left_out():
    assert lines([[0.5, NAN], [NAN, NAN], [0.25, 1.0]]) == [
        " layer   h0  h1",
        "     0   50   -",
        "     2   25 100",
    ]


def test_columns_line_up_under_their_heads():
    table = lines(np.random.default_rng(0).random((3, 120)))
    assert len({len(line) for line in table}) == 1


@pytest.mark.parametrize("width", [20, 30, 47, 80, 200])
def test_no_line_of_cells_is_wider_than_the_terminal(width):
    table = lines(np.random.default_rng(0).random((3, 40)), width=width)
    legend = "h0" in table[0] and "'" in table[-1]
    cells = table[:-1] if legend else table
    assert max(len(line) for line in cells) <= width


def test_shades_stand_in_for_numbers_that_do_not_fit():
    values = [[i / 24 for i in range(25)]]
    head, row, legend = lines(values, width=40)
    assert head == " layer h0        h10       h20"
    assert row == "     0 " + " " * 5 + "░" * 5 + "▒" * 5 + "▓" * 5 + "█" * 5
    assert legend.strip() == "' ' 0-20, '░' 20-40, '▒' 40-60, '▓' 60-80, '█' 80-100"
    assert (
        lines(values, width=40, shades=PLAIN_SHADES)[1].split(" ", 12)[-1].strip() == ".....:::::*****#####"
    )


def test_bands_together_hold_every_head_once():
    values = np.linspace(0, 1, 50)[None]
    table = lines(values, width=30)
    rows = [line[7:] for line in table if line.startswith("     0 ")]
    assert [len(row) for row in rows] == [23, 23, 4]
    assert "".join(rows) == lines(values, width=60)[1][7:]
    heads = [line for line in table if line.startswith(" layer")]
    assert heads == [" layer h0        h10       h20", " layer h23    h30       h40", " layer h46"]


def test_marks_stand_above_their_heads():
    for line in (x for x in lines(np.zeros((1, 50)), width=30) if x.startswith(" layer")):
        first = int(line.split("h")[1])
        for mark in line.split()[1:]:
            assert line.index(mark) - 7 == int(mark[1:]) - first


def test_equal_values_are_no_division_by_zero():
    assert lines([[2.0, 2.0]], percent=False)[1] == "     0  2.00 2.00"
    assert lines([[NAN]], percent=False) == [" layer  h0"]
