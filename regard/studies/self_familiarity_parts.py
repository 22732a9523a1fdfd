"""What the steps of the study `self-familiarity` measure, and what is made of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from regard.lens.familiarity import baselines
from regard.lens.familiarity.scoring import Familiarity, SelfFamiliarity
from regard.lens.familiarity.threshold import calibrate, everyday_concepts
from regard.studies.self_familiarity_names import PAIRS, SINGLES
from regard.tasks.invented import cross, nonce_names

BATCH = 20


def asker(model: Any, tokenizer: Any, size: Any) -> SelfFamiliarity:
    """Return what scores concepts, at the study's sizes."""
    return SelfFamiliarity(
        model, tokenizer, beams=size.beams, explain_tokens=size.explain_tokens,
        guess_tokens=size.guess_tokens, batch_size=BATCH, progress=False,
    )  # fmt: skip


def names(tokenizer: Any, size: Any, study_seed: int, seed: int) -> list[dict[str, Any]]:
    """Return the names of one seed, famous and invented in turn, none in two seeds.

    Each has `name`, `famous`, and `kind`: "crossed" for those of two words, "nonce" for single ones.
    """
    source = random.Random(f"{study_seed}/names")
    pairs, singles = list(PAIRS), list(SINGLES)
    source.shuffle(pairs)
    source.shuffle(singles)
    pairs = pairs[seed * size.pairs : (seed + 1) * size.pairs]
    singles = singles[seed * size.singles : (seed + 1) * size.singles]
    famous = [(name, "crossed") for pair in pairs for name in pair] + [(name, "nonce") for name in singles]
    invented = [name for pair in pairs for name in cross(*pair)]
    invented += nonce_names(tokenizer, singles, 1000 * study_seed + seed)
    both = zip(famous, invented, strict=True)
    return [
        {"name": name, "famous": real, "kind": kind}
        for (known, kind), made in both
        for name, real in ((known, True), (made, False))
    ]


def calibrated(model: Any, tokenizer: Any, size: Any, seed: int) -> dict[str, Any]:
    """Return a threshold fitted on everyday concepts, none of which is a name of the study."""
    concepts = random.Random(f"{seed}/everyday").sample(everyday_concepts(), size.everyday)
    found = calibrate(asker(model, tokenizer, size), concepts)
    scores = {concept: round(score, 5) for concept, score in found.familiar.items()}
    return {"value": found.value, "low": found.low, "high": found.high, "scores": scores}


def measured(
    model: Any, tokenizer: Any, size: Any, study_seed: int, seed: int, tick: Callable[[float], None]
) -> dict[str, Any]:
    """Return the names of one seed, each with its score, those of the controls, and every baseline."""
    known = asker(model, tokenizer, size)
    rows = names(tokenizer, size, study_seed, seed)
    concepts = [row["name"] for row in rows]
    explained = known.explain(concepts)
    tick(0.2)
    scored = known.guess_back(concepts, explained)
    tick(0.5)
    for column, values in _columns(known, concepts, scored, size, 1000 * study_seed + seed).items():
        for row, value in zip(rows, values, strict=True):
            row[column] = value
    tick(0.75)
    _control(known, rows, explained, 2 * size.controls)
    return {"names": rows}


def _columns(
    known: SelfFamiliarity, concepts: Sequence[str], scored: Sequence[Familiarity], size: Any, seed: int
) -> dict[str, Sequence[Any]]:
    """Score and baselines, a value a name."""
    explained, masked = [each.explanation for each in scored], [each.masked for each in scored]
    return {
        "score": [each.score for each in scored],
        "answer": [each.answer for each in scored],
        "masked": masked,
        "name_likelihood": baselines.name_likelihood(known, concepts),
        "forward": baselines.explanation_likelihood(known, concepts, explained),
        "backward": baselines.backward_likelihood(known, concepts, masked),
        "yes": baselines.says_yes(known, concepts),
        "agreement": baselines.agreement(known, concepts, size.samples, size.sample_tokens, seed),
        "frequency": baselines.word_frequency(concepts),
        "tokens": baselines.token_count(known, concepts),
    }


def _control(
    known: SelfFamiliarity, rows: list[dict[str, Any]], explained: Sequence[str], count: int
) -> None:
    """Add scores with the explanation of the next name, and with nothing masked, to evenly spread names."""
    places = _spread(len(rows) // 2, count // 2)
    picked = [2 * place + side for place in places for side in (0, 1)]
    concepts = [rows[place]["name"] for place in picked]
    own = [explained[place] for place in picked]
    other = [explained[(place + 2) % len(rows)] for place in picked]
    for column, found in (
        ("swapped", known.guess_back(concepts, other)),
        ("unmasked", known.guess_back(concepts, own, own)),
    ):
        for place, each in zip(picked, found, strict=True):
            rows[place][column] = each.score


def _spread(total: int, count: int) -> list[int]:
    return sorted({round(place * (total - 1) / max(1, count - 1)) for place in range(count)})


SIGNS = {
    "": "score", "_name": "name_likelihood", "_forward": "forward", "_backward": "backward", "_yes": "yes",
    "_agreement": "agreement", "_frequency": "frequency", "_tokens": "tokens",
}  # fmt: skip


def area(rows: Sequence[Mapping[str, Any]], sign: str) -> float:
    """Return the AUC of a sign, famous against invented."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score([row["famous"] for row in rows], [row[sign] for row in rows]))


def summed(result: Mapping[str, Any], limit: float) -> dict[str, float]:
    """Return every quantity of one seed."""
    rows = result["names"]
    crossed = [row for row in rows if row["kind"] == "crossed"]
    found = {f"auc{ending}": area(rows, sign) for ending, sign in SIGNS.items()}
    found["auc_crossed"] = area(crossed, "score")
    found["auc_crossed_name"] = area(crossed, "name_likelihood")
    found["auc_crossed_frequency"] = area(crossed, "frequency")
    found["auc_nonce"] = area([row for row in rows if row["kind"] == "nonce"], "score")
    control = {
        real: [row for row in rows if "swapped" in row and row["famous"] is real] for real in (True, False)
    }
    for name, (column, real) in {
        "score": ("score", True), "score_invented": ("score", False), "swapped": ("swapped", True),
        "unmasked": ("unmasked", True), "unmasked_invented": ("unmasked", False),
    }.items():  # fmt: skip
        found[name] = float(np.mean([row[column] for row in control[real]]))
    return {**found, **_gated(rows, limit), **_correlated(rows)}


def _gated(rows: Sequence[Mapping[str, Any]], limit: float) -> dict[str, float]:
    held = {
        real: np.mean([row["score"] <= limit for row in rows if row["famous"] is real])
        for real in (True, False)
    }
    right = np.mean([(row["score"] > limit) == row["famous"] for row in rows])
    always = np.mean([row["famous"] for row in rows])
    return {
        "accuracy": float(right), "accuracy_always": float(always),
        "withheld": float(held[False]), "withheld_famous": float(held[True]),
    }  # fmt: skip


def _correlated(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    from scipy.stats import spearmanr

    found = {}
    for name in ("frequency", "tokens"):
        values = [row[name] for row in rows]
        flat = len(set(values)) < 2
        found[f"rank_{name}"] = 0.0 if flat else float(spearmanr([row["score"] for row in rows], values)[0])
    return found
