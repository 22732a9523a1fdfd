"""Claims and the rules that decide them, as data: written before a study runs, shown beside its verdict.

A rule holds a linear contrast of two means against a threshold:

    d = measure - factor * control          above: d > threshold
                                            below: d < threshold
                                            within: |d| <= threshold

A rule whose contrast cannot fall on both sides of its threshold decides nothing, and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from regard.errors import RegardError

HOLDS, FAILS, UNKNOWN = "holds", "does not hold here", "cannot be told at this size"
VERDICTS = (HOLDS, FAILS, UNKNOWN)
COMPARISONS = {"above": ">", "below": "<", "within": "within ±"}


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """Something a study measures, several times where chance plays a part.

    Attributes:
        name: a word, unique in the study.
        about: what it is, in a few words.
        over: what it is measured several times over: `texts`, `seeds`, `draws`.
        low: the least it can be.
        high: the most it can be.
        unit: written after the number; `%` where the values are shares.
    """

    name: str
    about: str
    over: str = "seeds"
    low: float = -math.inf
    high: float = math.inf
    unit: str = ""

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise RegardError(f"{self.name}: low is {self.low} and high {self.high}; low must be less.")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Compare `measure - factor * control` with a threshold.

    Attributes:
        measure: name of a quantity.
        comparison: `above`, `below` or `within`.
        threshold: what it is compared with, in the quantity's own scale.
        control: name of the quantity set beside it; None compares with the threshold alone.
        factor: the control is multiplied by it first; 2 asks for twice the control.
        paired: the two quantities were measured on the same texts, seeds or draws, in the same order.
        least: how many values each quantity needs before anything can be told; 1 only where chance has no
            part.
    """

    measure: str
    comparison: str
    threshold: float
    control: str | None = None
    factor: float = 1.0
    paired: bool = False
    least: int = 3

    def __post_init__(self) -> None:
        if self.comparison not in COMPARISONS:
            raise RegardError(
                f"comparison is {self.comparison!r}; it must be one of {', '.join(COMPARISONS)}."
            )
        if not math.isfinite(self.threshold) or (self.comparison == "within" and self.threshold <= 0):
            raise RegardError(
                f"the threshold of {self.measure} is {self.threshold}; it must be a finite number, and above "
                "0 for `within`."
            )
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise RegardError(f"the factor of {self.measure} is {self.factor}; it must be above 0.")
        if self.control == self.measure:
            raise RegardError(f"{self.measure} is its own control.")
        if self.least < 1:
            raise RegardError(f"least is {self.least}; a rule needs at least one value.")

    def text(self, quantities: Mapping[str, Quantity]) -> str:
        """Return the rule in one line, such as `first - 2 x second > 18 %`."""
        factor = "" if self.factor == 1 else f"{self.factor:g} × "
        control = "" if self.control is None else f" − {factor}{self.control}"
        limit = shown(self.threshold, quantities[self.measure].unit)
        sign = COMPARISONS[self.comparison]
        return f"{self.measure}{control} {sign}{'' if self.comparison == 'within' else ' '}{limit}"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence that can turn out false.

    Attributes:
        name: a few letters, unique in the study.
        text: the claim, in one sentence.
        rules: all must hold; at least one has a control.
        needs: rules without which the claim cannot be told, such as that training has worked at all.
        main: the study's verdict is that of its main claims together.
        paper: the paper's own figure, and where it stands.
    """

    name: str
    text: str
    rules: Sequence[Rule]
    needs: Sequence[Rule] = ()
    main: bool = False
    paper: str = ""


def check_claims(claims: Sequence[Claim], quantities: Mapping[str, Quantity]) -> None:
    """Refuse claims that cannot be tested as they stand.

    Raises:
        RegardError: where there is no main claim, two have one name, one has no rule or no control, or a
            rule names an unknown quantity or could come out only one way.
    """
    names = [claim.name for claim in claims]
    if len(set(names)) < len(names):
        raise RegardError(f"two claims have one name; they are {', '.join(names)}.")
    if not any(claim.main for claim in claims):
        raise RegardError("no claim is marked main=True; a study's verdict is that of its main claims.")
    for claim in claims:
        if not any(rule.control for rule in claim.rules):
            raise RegardError(f"claim {claim.name!r} is compared with no control; give one of its rules one.")
        for rule in (*claim.rules, *claim.needs):
            _check_rule(rule, claim, quantities)


def _check_rule(rule: Rule, claim: Claim, quantities: Mapping[str, Quantity]) -> None:
    for name in filter(None, (rule.measure, rule.control)):
        if name not in quantities:
            raise RegardError(
                f"claim {claim.name!r} names {name!r}; the study measures {', '.join(quantities)}."
            )
    low, high = _span(rule, quantities)
    if rule.comparison == "within":
        passes = low <= rule.threshold and high >= -rule.threshold
        fails = low < -rule.threshold or high > rule.threshold
    else:
        passes = high > rule.threshold if rule.comparison == "above" else low < rule.threshold
        fails = low <= rule.threshold if rule.comparison == "above" else high >= rule.threshold
    if passes and fails:
        return
    outcome = "fails" if passes else "holds"
    raise RegardError(
        f"claim {claim.name!r}: {rule.text(quantities)} never {outcome}, whatever is measured: the left side "
        f"lies between {low:g} and {high:g}. Such a rule decides nothing."
    )


def _span(rule: Rule, quantities: Mapping[str, Quantity]) -> tuple[float, float]:
    """Return the least and the most that `measure - factor * control` can be."""
    measure = quantities[rule.measure]
    if rule.control is None:
        return measure.low, measure.high
    control = quantities[rule.control]
    return measure.low - rule.factor * control.high, measure.high - rule.factor * control.low


def shown(value: float | None, unit: str = "") -> str:
    """Return a value with its unit: shares in per cent, others with three digits.

    Example:
        >>> shown(0.1818, "%"), shown(1.0, "nats"), shown(None)
        ('18.2 %', '1 nats', '-')
    """
    if value is None or not math.isfinite(value):
        return "-"
    if unit == "%":
        return f"{_plain(round(100 * value, 1))} %"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{text} {unit}".rstrip()


def _plain(value: float) -> str:
    return f"{value + 0.0:.1f}".removesuffix(".0")
