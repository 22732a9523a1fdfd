"""Times are taken in turns, and disturbed rounds are left out."""

import json

import pytest

from benchmarks import results, timing
from benchmarks.timing import Times, interleaved


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr(timing, "waited", lambda: 0.0)


def test_cases_take_turns(quiet):
    calls = []
    times = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, warm=1)
    assert "".join(calls) == "abababab"
    assert len(times.seconds["a"]) == len(times.seconds["b"]) == 3
    assert times.dropped == 0


def test_a_ratio_is_the_median_of_rounds_and_not_the_ratio_of_medians():
    times = Times({"a": [2.0, 9.0, 30.0], "b": [1.0, 3.0, 20.0]})
    assert times.ratio("a", "b") == 2.0
    assert times.median("a") / times.median("b") == 3.0
    assert times.spread("a", "b") == (1.5, 3.0)


def test_a_case_may_tell_its_own_seconds(quiet):
    times = interleaved({"a": lambda: 7.0}, 2, warm=0)
    assert times.median("a") == 7.0


def test_disturbed_rounds_are_repeated(monkeypatch):
    """Of every two readings within a round, the first two rounds wait as long as they take."""
    readings = iter([0.0, 9.0, 9.0, 18.0, 18.0, 18.0, 18.0, 18.0])
    monkeypatch.setattr(timing, "waited", lambda: next(readings))
    times = interleaved({"a": lambda: 1.0}, 2, warm=0)
    assert times.dropped == 2 and len(times.seconds["a"]) == 2


def test_rounds_count_where_all_are_disturbed(monkeypatch):
    readings = iter(float(9 * n) for n in range(100))
    monkeypatch.setattr(timing, "waited", lambda: next(readings))
    numbers = iter([1.0, 2.0, 3.0, 4.0])
    times = interleaved({"a": lambda: next(numbers)}, 2, warm=0)
    assert list(times.seconds["a"]) == [3.0, 4.0] and times.dropped == 2


def test_answers_to_the_same_question_are_replaced(tmp_path):
    path = tmp_path / "found.json"
    results.keep(path, "watch", {"rows": [{"case": 1, "s": 1.0}, {"case": 2, "s": 2.0}]})
    results.keep(path, "watch", {"rows": [{"case": 2, "s": 3.0}]})
    results.keep(path, "startup", {"rows": [{"case": 2, "s": 4.0}]})
    found = json.loads(path.read_text())
    assert [row["s"] for row in found["watch"]["rows"]] == [1.0, 3.0]
    assert [row["s"] for row in found["startup"]["rows"]] == [4.0]


def test_a_table_shows_every_column():
    shown = results.table([{"case": 1, "s": 1.23456}, {"case": 2, "bound": None, "s": 2.0}])
    assert shown.splitlines()[0].split() == ["|", "case", "|", "s", "|", "bound", "|"]
    assert "1.23 " in shown and len({len(line) for line in shown.splitlines()}) == 1
