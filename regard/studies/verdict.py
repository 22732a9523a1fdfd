"""From measured values to verdicts, by the rules of the claims and nothing else.

A rule holds where the whole 95 % interval of its contrast is on the asked side of the threshold, fails where
all of it is on the other side, and cannot be told where the threshold lies inside, where there are too few
values or where one is not a number. A claim holds where all its rules hold, and fails where one fails.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from regard.errors import RegardError
from regard.studies.claims import FAILS, HOLDS, UNKNOWN, Claim, Quantity, Rule
from regard.studies.statistics import Estimate, contrast, mean

Values = Mapping[str, Sequence[float | None]]


def judge(
    claims: Sequence[Claim], quantities: Mapping[str, Quantity], values: Values
) -> tuple[str, list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return the study's verdict, its claims with theirs, and the measures, as an outcome holds them.

    Args:
        claims: with their rules.
        quantities: what is measured, by name.
        values: of every quantity; None, or NaN, for one that is not a number.

    Raises:
        RegardError: where values are missing, out of their quantity's range, or cannot be paired.
    """
    _check_values(quantities, values)
    measures = {name: _measured(quantities[name], values[name]) for name in quantities}
    judged = [_judge_claim(claim, quantities, values) for claim in claims]
    verdict = together(said["verdict"] for said in judged if said["main"])
    return verdict, judged, measures


def together(verdicts: Iterable[str]) -> str:
    """Return the verdict on several things at once: fails where one fails, holds where all hold."""
    found = set(verdicts)
    return FAILS if FAILS in found else UNKNOWN if UNKNOWN in found else HOLDS


def decide(rule: Rule, found: Estimate, fewest: int) -> tuple[str, str]:
    """Return the verdict of one rule, and why where it cannot be told.

    Args:
        rule: with its threshold.
        found: the contrast, without interval where it is a single value.
        fewest: how many values the rule's quantities have, the fewer of the two.
    """
    if fewest < rule.least:
        return UNKNOWN, f"{fewest} values; the rule asks for {rule.least}"
    low, high = (found.value if end is None else end for end in (found.low, found.high))
    if not (math.isfinite(low) and math.isfinite(high)):
        return UNKNOWN, found.method
    limit = rule.threshold
    if rule.comparison == "within":
        holds, fails = -limit <= low and high <= limit, low > limit or high < -limit
    elif rule.comparison == "above":
        holds, fails = low > limit, high <= limit
    else:
        holds, fails = high < limit, low >= limit
    if holds or fails:
        return (HOLDS if holds else FAILS), ""
    return UNKNOWN, "the threshold lies inside the interval"


def _check_values(quantities: Mapping[str, Quantity], values: Values) -> None:
    if set(values) != set(quantities):
        odd = ", ".join(sorted(set(values) ^ set(quantities)))
        raise RegardError(f"what was measured is not what the study declares: {odd}.")
    for name, quantity in quantities.items():
        if not len(values[name]):
            raise RegardError(f"{name} has no values.")
        for value in _numbers(values[name]):
            if math.isfinite(value) and not quantity.low <= value <= quantity.high:
                raise RegardError(
                    f"{name} was measured as {value:g}; it lies between {quantity.low:g} and "
                    f"{quantity.high:g}."
                )


def _judge_claim(claim: Claim, quantities: Mapping[str, Quantity], values: Values) -> dict[str, Any]:
    rules = [_judge_rule(rule, quantities, values) for rule in claim.rules]
    needs = [_judge_rule(rule, quantities, values) for rule in claim.needs]
    told = together(rule["verdict"] for rule in rules)
    met = all(rule["verdict"] == HOLDS for rule in needs)
    return {
        "name": claim.name,
        "text": claim.text,
        "paper": claim.paper,
        "main": claim.main,
        "verdict": told if met else UNKNOWN,
        "rules": rules,
        "needs": needs,
    }


def _judge_rule(rule: Rule, quantities: Mapping[str, Quantity], values: Values) -> dict[str, Any]:
    measure = _numbers(values[rule.measure])
    counts = [len(measure)]
    if rule.control is None:
        found = mean(measure)
    else:
        control = _numbers(values[rule.control])
        counts.append(len(control))
        if rule.paired and len(set(counts)) > 1:
            raise RegardError(
                f"{rule.measure} has {counts[0]} values and {rule.control} {counts[1]}; they cannot be "
                "paired."
            )
        found = contrast(measure, control, factor=rule.factor, paired=rule.paired)
    verdict, why = decide(rule, found, min(counts))
    told = {"text": rule.text(quantities), **dataclasses.asdict(rule), **_plain(found)}
    return {**told, "values": counts, "verdict": verdict, "why": why}


def _measured(quantity: Quantity, values: Sequence[float | None]) -> dict[str, Any]:
    numbers = _numbers(values)
    found = _plain(mean(numbers))
    del found["p"]
    for end in ("low", "high"):
        if found[end] is not None:
            found[end] = min(max(found[end], quantity.low), quantity.high)
    told = {"about": quantity.about, "unit": quantity.unit, "over": quantity.over, **found}
    return {**told, "values": [x if math.isfinite(x) else None for x in numbers]}


def _plain(found: Estimate) -> dict[str, Any]:
    """Return an estimate as JSON takes it, what is not a number as None."""
    told = dataclasses.asdict(found)
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in told.items()}


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]
