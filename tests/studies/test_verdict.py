"""From values to verdicts."""

import math

import pytest

from regard.errors import RegardError
from regard.studies import FAILS, HOLDS, UNKNOWN, Claim, Quantity, Rule
from regard.studies.statistics import Estimate
from regard.studies.verdict import decide, judge, together

QUANTITIES = {
    "a": Quantity(name="a", about="a", low=0, high=10),
    "b": Quantity(name="b", about="b", low=0, high=10),
    "learned": Quantity(name="learned", about="accuracy", low=0, high=1),
}
HIGH, LOW, BETWEEN = [5.0, 5.1, 4.9, 5.0], [1.0, 1.1, 0.9, 1.0], [0.0, 5.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("comparison", "interval", "verdict"),
    [
        ("above", (1.1, 2), HOLDS),
        ("above", (0, 1), FAILS),
        ("above", (0.5, 1.5), UNKNOWN),
        ("below", (0, 0.9), HOLDS),
        ("below", (1, 2), FAILS),
        ("below", (0.5, 1.5), UNKNOWN),
        ("within", (-1, 1), HOLDS),
        ("within", (1.1, 2), FAILS),
        ("within", (-3, -1.1), FAILS),
        ("within", (-2, 2), UNKNOWN),
    ],
)
def test_the_interval_decides(comparison, interval, verdict):
    rule = Rule(measure="a", comparison=comparison, threshold=1, least=2)
    found = Estimate(sum(interval) / 2, *interval, "made up")
    assert decide(rule, found, 2)[0] == verdict
    assert decide(rule, found, 1)[0] == UNKNOWN


def test_a_single_value_decides_only_where_the_rule_asks_for_no_more():
    point = Estimate(2.0, None, None, "a single value")
    assert decide(Rule(measure="a", comparison="above", threshold=1, least=1), point, 1)[0] == HOLDS
    verdict, why = decide(Rule(measure="a", comparison="above", threshold=1), point, 1)
    assert verdict == UNKNOWN and why == "1 values; the rule asks for 3"


def outcome(a, b, learned=(1.0, 1.0, 1.0)):
    rule = Rule(measure="a", comparison="above", threshold=1, control="b")
    need = Rule(measure="learned", comparison="above", threshold=0.9)
    claim = Claim(name="c", text="", rules=[rule], needs=[need], main=True)
    verdict, claims, measures = judge([claim], QUANTITIES, {"a": a, "b": b, "learned": learned})
    assert claims[0]["verdict"] == verdict
    return verdict, claims[0], measures


def test_a_claim_holds_fails_or_cannot_be_told():
    assert outcome(HIGH, LOW)[0] == HOLDS
    assert outcome(LOW, HIGH)[0] == FAILS
    assert outcome(BETWEEN, LOW)[0] == UNKNOWN


def test_a_claim_whose_need_is_not_met_cannot_be_told():
    for a, b in ((HIGH, LOW), (LOW, HIGH)):
        assert outcome(a, b, learned=(0.5, 0.5, 0.5))[0] == UNKNOWN


def test_a_run_that_diverged_is_not_left_out():
    verdict, claim, measures = outcome([*HIGH, None], LOW)
    assert verdict == UNKNOWN and claim["rules"][0]["why"] == "a value is not a number"
    assert measures["a"]["value"] is None and measures["a"]["values"][-1] is None
    assert outcome([*HIGH, math.nan], LOW)[0] == UNKNOWN


def test_one_claim_that_fails_fails_the_study():
    assert together([HOLDS, FAILS, UNKNOWN]) == FAILS
    assert together([HOLDS, UNKNOWN]) == UNKNOWN
    assert together([HOLDS, HOLDS]) == HOLDS


def test_only_main_claims_count_for_the_study():
    rules = [Rule(measure="a", comparison="above", threshold=1, control="b")]
    against = [Rule(measure="b", comparison="above", threshold=1, control="a")]
    claims = [
        Claim(name="m", text="", rules=rules, main=True),
        Claim(name="o", text="", rules=against),
    ]
    verdict, judged, _ = judge(claims, QUANTITIES, {"a": HIGH, "b": LOW, "learned": [1.0]})
    assert verdict == HOLDS and [c["verdict"] for c in judged] == [HOLDS, FAILS]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"a": HIGH, "b": LOW}, "not what the study declares: learned"),
        ({"a": HIGH, "b": LOW, "learned": []}, "learned has no values"),
        ({"a": [11.0], "b": LOW, "learned": [1.0]}, "a was measured as 11; it lies between 0 and 10"),
        ({"a": HIGH[:3], "b": LOW, "learned": [1.0]}, "a has 3 values and b 4; they cannot be paired"),
    ],
)
def test_values_that_do_not_fit_are_refused(values, message):
    rule = Rule(measure="a", comparison="above", threshold=1, control="b", paired=True)
    with pytest.raises(RegardError, match=message):
        judge([Claim(name="c", text="", rules=[rule], main=True)], QUANTITIES, values)


def test_intervals_of_a_mean_stay_in_range():
    _, _, measures = outcome([0.0, 0.0, 1.0], HIGH)
    assert measures["a"]["low"] == 0.0
