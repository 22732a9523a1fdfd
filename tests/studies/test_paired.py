"""Treatments, baseline and placebo on the same items."""

import numpy as np
import pytest

from regard.errors import RegardError
from regard.studies.paired import compare_paired, holm

RNG = np.random.default_rng(0)
BASE = RNG.normal(size=60).tolist()
HELPS = [x + 0.5 + 0.2 * e for x, e in zip(BASE, RNG.normal(size=60), strict=True)]
IDLE = [x + 0.2 * e for x, e in zip(BASE, RNG.normal(size=60), strict=True)]


def test_pairs_tell_what_means_do_not():
    found = {one.name: one for one in compare_paired({"helps": HELPS, "idle": IDLE}, BASE, placebo=IDLE)}
    helps, idle = found["helps"], found["idle"]
    assert helps.items == 60 and helps.effect.low > 0.4 and helps.p < 0.01
    assert helps.treated - helps.baseline == pytest.approx(helps.effect.value)
    assert idle.effect.low < 0 < idle.effect.high and idle.p > 0.05
    assert helps.over_placebo.low > 0.3 and idle.over_placebo.value == 0 and idle.p_over_placebo == 1
    assert helps.placebo == idle.placebo == idle.effect


def test_an_effect_that_any_placebo_has_is_seen_as_such():
    [found] = compare_paired({"edit": HELPS}, BASE, placebo=[HELPS, HELPS])
    assert found.p < 0.01 and found.placebo.value == found.effect.value
    assert found.over_placebo.value == 0


def test_many_tries_are_corrected():
    rng = np.random.default_rng(1)
    tries = {str(n): [x + e for x, e in zip(BASE, rng.normal(size=60), strict=True)] for n in range(20)}
    found = compare_paired(tries, BASE)
    assert sum(one.effect.p < 0.06 for one in found) > 0 == sum(one.p < 0.06 for one in found)
    assert all(one.p >= one.effect.p for one in found)
    assert found[0].placebo is None and found[0].p_over_placebo is None


def test_holm_steps_down():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.parametrize(
    "given, message",
    [
        (({}, [1.0]), "needs a treatment"),
        (({"a": []}, []), "an item at least"),
        (({"a": [1.0]}, [1.0, 2.0]), "a has 1 scores, and the baseline 2"),
        (({"a": [float("nan")]}, [1.0]), "a has a score that is not a number"),
        (({"a": [1.0]}, [1.0], [[1.0], [1.0, 2.0]]), "placebo 1 has 2 scores"),
    ],
)
def test_refusals(given, message):
    with pytest.raises(RegardError, match=message):
        compare_paired(*given)
