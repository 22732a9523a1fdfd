"""Intervals and tests of means: against scipy's plain formulas, by coverage, and at the edges."""

import math

import numpy as np
import pytest
from scipy import stats

from regard.studies.statistics import contrast, mean, permutation_p


def test_few_values_get_students_interval():
    x = [1.0, 2.0, 4.0, 8.0]
    half = stats.t.ppf(0.975, 3) * np.std(x, ddof=1) / 2
    found = mean(x)
    assert (found.low, found.high) == pytest.approx((3.75 - half, 3.75 + half))
    assert "Student" in found.method


@pytest.mark.parametrize("n", [4, 20])
def test_intervals_hold_the_truth_about_as_often_as_they_say(n):
    rng = np.random.default_rng(1)
    found = [mean(rng.normal(3.0, 2.0, n)) for _ in range(60)]
    inside = sum(f.low <= 3.0 <= f.high for f in found)
    assert 50 <= inside <= 60
    assert all(f.low < f.value < f.high for f in found)


def test_pairing_removes_what_pairs_share():
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 10, 15)
    a, b = shared + 1 + rng.normal(0, 0.1, 15), shared + rng.normal(0, 0.1, 15)
    paired, apart = contrast(a, b, paired=True), contrast(a, b)
    assert paired.value == pytest.approx(apart.value)
    assert paired.high - paired.low < 0.3 < 5 < apart.high - apart.low
    assert paired.p < 0.001 and apart.p > 0.5


def test_unpaired_few_values_get_welchs_interval():
    a, b = [1.0, 2.0, 3.0], [0.0, 0.5, 4.0, 1.0]
    interval = stats.ttest_ind(a, [2 * x for x in b], equal_var=False).confidence_interval(0.95)
    found = contrast(a, b, factor=2)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.value == pytest.approx(2 - 2 * 1.375)


def test_unpaired_many_values_are_bootstrapped():
    rng = np.random.default_rng(0)
    found = contrast(rng.normal(1, 1, 30), rng.normal(0, 1, 12))
    assert "bootstrap, 30 and 12" in found.method and found.low < found.value < found.high


def test_permutations_are_exact_where_they_are_few():
    a, b = np.array([1.0, 2.0, 3.0]), np.zeros(3)
    assert permutation_p(a, b, paired=True) == pytest.approx(2 / 8)
    assert permutation_p(a, b, paired=False) == pytest.approx(2 / 20)


@pytest.mark.parametrize("control", [[0.0], [0.0, 0.0, 0.0]])
def test_equal_values_have_an_interval_without_width(control):
    found = contrast([1.0, 1.0, 1.0], control)
    assert (found.low, found.high) == (1.0, 1.0)


def test_values_that_differ_by_rounding_count_as_equal(recwarn):
    found = contrast([1.0, 1.0 + 1e-15, 1.0], [0.5, 0.5, 0.5 - 1e-16])
    assert found.low == found.high == found.value and len(recwarn) == 0


def test_a_sample_of_equal_values_beside_one_that_varies(recwarn):
    found, alone = contrast([1.0, 2.0, 4.0], [3.0, 3.0, 3.0]), mean([-2.0, -1.0, 1.0])
    assert (found.low, found.high) == pytest.approx((alone.low, alone.high)) and len(recwarn) == 0


def test_a_single_value_has_no_interval():
    assert (mean([2.0]).low, mean([2.0]).value) == (None, 2.0)
    assert contrast([2.0], [1.0]).low is None


def test_one_value_that_is_no_number_spoils_the_mean():
    for found in (mean([1.0, math.nan]), contrast([1.0, math.inf], [1.0, 1.0], paired=True)):
        assert math.isnan(found.value) and found.low is None


def test_the_same_values_give_the_same_interval():
    x = np.random.default_rng(0).normal(size=25)
    assert mean(x) == mean(x)
