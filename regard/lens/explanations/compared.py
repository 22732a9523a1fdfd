"""Several methods on the same texts: their scores, how far they agree, how faithful and how long each is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from regard.errors import RegardError, UnsupportedModel
from regard.lens.explanations.attribution import MOST_STEPS, STEPS
from regard.lens.explanations.measures import Top
from regard.lens.explanations.methods import (
    COMPARED,
    METHODS,
    REDUCTION,
    Explainer,
    Explanation,
    check_methods,
    check_options,
)
from regard.lens.explanations.pairs import RANDOM, Agreement, agreement, interval_of
from regard.lens.explanations.removal import Faithful, faithfulness
from regard.lens.explanations.subject import Target, subject_of
from regard.runtime.findings import Finding
from regard.runtime.table import Table


@dataclass(frozen=True, eq=False)
class Comparison:
    """What several methods say of the same texts.

    Attributes:
        explanations: method -> one a text, in the order of the texts.
        again: method that draws -> one a text, under another seed.
        faithful: method, or "random" -> deletion and insertion of each text; empty where not asked for.
        left_out: method -> why it could not be computed.
        seconds: method -> mean seconds a text; the forward that methods of attention share counts with the
            first of them.
    """

    explanations: Mapping[str, Sequence[Explanation]]
    again: Mapping[str, Sequence[Explanation]] = field(default_factory=dict)
    faithful: Mapping[str, Sequence[Faithful]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(self.explanations)

    def __len__(self) -> int:
        return len(next(iter(self.explanations.values())))

    def agreement(
        self,
        measure: str = "kendall",
        *,
        k: Top = 5,
        p: float = 0.5,
        drop_first: bool = False,
        special: bool = True,
        signed: bool = False,
        unconverged: bool = False,
    ) -> Agreement:
        """Return how far the methods agree; see `regard.lens.explanations.agreement`.

        Args:
            measure, k, p, drop_first: as there.
            special: whether tokens that the tokenizer added are ranked too.
            signed: rank signed scores rather than absolute ones.
            unconverged: whether integrated gradients that have not converged are ranked too.
        """
        notes = [REDUCTION[0].upper() + REDUCTION[1:] + "." if not signed else "Signed scores are ranked."]
        scores: dict[str, list[Any]] = {}
        for name, told in {**self.explanations, **self._named_again()}.items():
            scores[name] = [self._vector(e, special, signed, unconverged) for e in told]
        missing = sum(x is None for told in scores.values() for x in told)
        if missing:
            notes.append(
                f"Integrated gradients of {missing} texts are off by 5 % or more and are not ranked."
            )
        if not special:
            notes.append("Special tokens are left out.")
        return agreement(scores, measure, k=k, p=p, drop_first=drop_first, notes=notes)

    def _named_again(self) -> dict[str, Sequence[Explanation]]:
        return {f"{name} again": told for name, told in self.again.items()}

    @staticmethod
    def _vector(e: Explanation, special: bool, signed: bool, unconverged: bool) -> Any:
        if not (e.converged or unconverged):
            return None
        values = e.values if signed else e.scores
        return values if special else values[~np.array(e.special, dtype=bool)]

    @property
    def faithfulness(self) -> Table:
        """One row a method: what its order gains over random orders, with 95 % intervals over the texts."""
        rows: dict[str, list[Any]] = {}
        for name in self.faithful:
            if name == RANDOM:
                continue
            row: dict[str, Any] = {"method": name}
            for at, kind in enumerate(Faithful._fields):
                gain = np.array(
                    [a[at] - b[at] for a, b in zip(self.faithful[name], self.faithful[RANDOM], strict=True)]
                )
                low, high = interval_of(gain)
                row |= {kind: gain.mean(), f"{kind} low": low, f"{kind} high": high}
            for column, value in row.items():
                rows.setdefault(column, []).append(value)
        return Table(rows, title="gained over random orders by deletion and insertion")

    @property
    def errors(self) -> Table:
        """One row a method whose scores should sum to F(e) - F(e0): how far they are off."""
        rows = [
            (name, [abs(e.error or 0.0) for e in told], [abs(e.value - e.value_baseline) for e in told])
            for name, told in self.explanations.items()
            if all(e.error is not None for e in told)
        ]
        return Table(
            {
                "method": [name for name, _, _ in rows],
                "median error": [float(np.median(off)) for _, off, _ in rows],
                "largest error": [float(np.max(off)) for _, off, _ in rows],
                "median difference": [float(np.median(whole)) for _, _, whole in rows],
            },
            title="completeness: |sum of scores - (F(e) - F(e0))| beside |F(e) - F(e0)|",
        )

    def findings(self) -> tuple[Finding, ...]:
        """Return what is to be said: agreement with chance and warning, faithfulness, what was left out."""
        found = [Finding(sentence) for sentence in self.agreement().said()]
        table = self.faithfulness
        for kind in Faithful._fields if self.faithful and len(self) > 1 else ():
            better = [row["method"] for row in table.rows() if row[f"{kind} low"] > 0]
            names = ", ".join(better) or "none"
            found.append(Finding(f"By {kind}, these rank tokens better than random orders do: {names}."))
        found += [Finding(f"{name} is left out: {why}") for name, why in self.left_out.items()]
        return tuple(found)

    def panels(self) -> tuple[Any, ...]:
        """Return the panels of the report: tokens coloured by each method, the matrices, faithfulness."""
        from regard.lens.explanations.panels import panels_of

        return panels_of(self)


def compare_methods(
    model: Any,
    tokenizer: Any,
    texts: Iterable[Any],
    methods: Sequence[str] | None = None,
    target: Target | Sequence[Target] = "predicted",
    *,
    baseline: Any = "pad",
    of: str | None = None,
    samples: int | None = None,
    steps: int = STEPS,
    most_steps: int = MOST_STEPS,
    faithful: bool = True,
    seed: int = 0,
    tick: Callable[[], None] | None = None,
) -> Comparison:
    """Explain every text by every method, and methods that draw once more under another seed.

    Args:
        model, tokenizer, baseline, of, samples, steps, most_steps, seed: as for `explain`.
        texts: words or token ids [n] each.
        methods: names in `METHODS`, all of which must work; default those of `COMPARED` that the model
            allows.
        target: as for `explain`, the same for all texts; a list has one for each.
        faithful: whether deletion and insertion are measured too.
        tick: called after each text.

    Returns:
        A `Comparison`: `.agreement()`, `.faithfulness`, `.errors`, `.explanations`.

    Raises:
        UnsupportedModel, RegardError: as for `explain`, and where no text or fewer than two methods are left.
    """
    given = list(texts)
    names = list(dict.fromkeys(COMPARED if methods is None else methods))
    check_methods(names)
    check_options(samples=samples, steps=steps, most_steps=most_steps, seed=seed)
    if not given:
        raise RegardError("compare_methods needs at least one text.")
    targets = list(target) if isinstance(target, list) else [target] * len(given)
    if len(targets) != len(given):
        raise RegardError(f"target lists {len(targets)} for {len(given)} texts; give one for each, or one.")
    made = [
        subject_of(model, tokenizer, text, one, baseline=baseline, of=of)
        for text, one in zip(given, targets, strict=True)
    ]
    found: dict[str, list[Explanation]] = {name: [] for name in names}
    again: dict[str, list[Explanation]] = {name: [] for name in names if METHODS[name].chance}
    curves: dict[str, list[Faithful]] = {}
    seconds, left_out = dict.fromkeys(names, 0.0), dict[str, str]()
    for number, subject in enumerate(made):
        explainer = Explainer(subject, samples, steps, most_steps)
        for name in list(found):
            start = time.perf_counter()
            try:
                found[name].append(explainer.of(name, seed + 2 * number))
            except (UnsupportedModel, RegardError) as why:
                if methods is not None:
                    raise
                left_out[name] = str(why)
                found.pop(name)
                again.pop(name, None)
                continue
            seconds[name] += time.perf_counter() - start
            if name in again:
                again[name].append(explainer.of(name, seed + 2 * number + 1))
        if faithful:
            scores = {name: told[-1].scores for name, told in found.items()}
            for name, value in faithfulness(subject, scores, seed=seed + number).items():
                curves.setdefault(name, []).append(value)
        if tick is not None:
            tick()
    if len(found) < 2:
        raise RegardError(f"a comparison takes two methods, and {len(found)} can be computed: {left_out}.")
    kept = {name: told for name, told in curves.items() if name in found or name == RANDOM}
    taken = {name: seconds[name] / len(made) for name in found}
    return Comparison(found, again, kept, left_out, taken)
