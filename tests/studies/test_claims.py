"""Rules as data: what is refused, and how a rule reads."""

import math

import pytest

from regard.errors import RegardError
from regard.studies import Claim, Quantity, Rule
from regard.studies.claims import check_claims, shown

SHARE = {
    "sink": Quantity(name="sink", about="a share", low=0, high=1, unit="%"),
    "other": Quantity(name="other", about="another", low=0, high=1, unit="%"),
    "loss": Quantity(name="loss", about="a loss", low=0, unit="nats"),
}


def claim(**rule):
    rule = {"measure": "sink", "control": "other", "comparison": "above", "threshold": 0.2, **rule}
    return Claim(name="c", text="It is so.", rules=[Rule(**rule)], main=True)


@pytest.mark.parametrize(
    ("rule", "never"),
    [
        ({"comparison": "above", "threshold": -1.5}, "never fails"),
        ({"comparison": "above", "threshold": 1.0}, "never holds"),
        ({"comparison": "below", "threshold": 1.5}, "never fails"),
        ({"comparison": "below", "threshold": -1.0}, "never holds"),
        ({"comparison": "within", "threshold": 1.0}, "never fails"),
        ({"comparison": "below", "threshold": 1.01, "factor": 0.1}, "never fails"),
        ({"measure": "loss", "comparison": "above", "threshold": -1.001}, "never fails"),
    ],
)
def test_a_rule_that_can_come_out_only_one_way_is_refused(rule, never):
    with pytest.raises(RegardError, match=f"{never}, whatever is measured"):
        check_claims([claim(**rule)], SHARE)


@pytest.mark.parametrize(
    "rule",
    [
        {"threshold": -0.99},
        {"threshold": 0.99},
        {"comparison": "below", "threshold": 0.99},
        {"comparison": "within", "threshold": 0.99},
        {"comparison": "below", "threshold": 0.0, "factor": 0.1},
        {"measure": "loss", "threshold": 0.0},
    ],
)
def test_a_rule_that_can_come_out_both_ways_is_taken(rule):
    check_claims([claim(**rule)], SHARE)


def test_what_cannot_be_reached_without_a_control_is_refused():
    rules = [Rule(measure="sink", comparison="above", threshold=-0.1), claim().rules[0]]
    with pytest.raises(RegardError, match="never fails"):
        check_claims([Claim(name="c", text="", rules=rules, main=True)], SHARE)


def test_a_claim_needs_a_control():
    alone = Rule(measure="sink", comparison="above", threshold=0.2)
    with pytest.raises(RegardError, match="'c' is compared with no control"):
        check_claims([Claim(name="c", text="", rules=[alone], main=True)], SHARE)


def test_claims_need_a_main_one_and_names_of_their_own():
    import dataclasses

    with pytest.raises(RegardError, match="no claim is marked main"):
        check_claims([dataclasses.replace(claim(), main=False)], SHARE)
    with pytest.raises(RegardError, match="two claims have one name"):
        check_claims([claim(), claim()], SHARE)


def test_an_unknown_quantity_is_named():
    with pytest.raises(RegardError, match="names 'sunk'; the study measures sink, other, loss"):
        check_claims([claim(measure="sunk")], SHARE)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"comparison": "over"}, "must be one of above, below, within"),
        ({"threshold": math.inf}, "must be a finite number"),
        ({"threshold": math.nan}, "must be a finite number"),
        ({"comparison": "within", "threshold": 0}, "above 0 for `within`"),
        ({"factor": 0}, "factor of sink is 0"),
        ({"factor": -1}, "must be above 0"),
        ({"control": "sink"}, "its own control"),
        ({"least": 0}, "at least one value"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(rule, message):
    with pytest.raises(RegardError, match=message):
        claim(**rule)


def test_a_quantity_has_a_range():
    with pytest.raises(RegardError, match="low must be less"):
        Quantity(name="x", about="x", low=1, high=1)


def test_rules_read_as_formulas():
    def text(**rule):
        return claim(**rule).rules[0].text(SHARE)

    assert text(threshold=0.1818) == "sink − other > 18.2 %"
    assert text(comparison="below", factor=0.1, threshold=0) == "sink − 0.1 × other < 0 %"
    assert text(comparison="within") == "sink − other within ±20 %"
    assert text(measure="loss", control=None) == "loss > 0.2 nats"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.5, "%", "50 %"),
        (-0.0001, "%", "0 %"),
        (1234.5, "", "1,234"),
        (math.nan, "%", "-"),
        (0.0123, "s", "0.0123 s"),
    ],
)
def test_values_as_shown(value, unit, text):
    assert shown(value, unit) == text
