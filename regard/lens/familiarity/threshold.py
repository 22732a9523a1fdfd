"""Where familiar begins: a threshold fitted on concepts, and kept with the model that it was fitted for.

    everyday concepts alone     the middle of the 95 % bootstrap interval (BCa) of the 5th percentile
    with unfamiliar ones        the threshold of best balanced accuracy, 1/2 (shares told right of each)

Source: Luo, Xiao and Ma, 2023, arXiv 2309.02654, and its official code, for the first. Status: the first
agrees with the official code but for its concepts, which are ours; the second is our choice.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module, resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regard.errors import RegardError
from regard.lens.familiarity.scoring import Familiarity, SelfFamiliarity
from regard.runtime.anatomy import anatomy_of
from regard.runtime.model_identity import check_same, identify
from regard.runtime.resumable import Resumable
from regard.runtime.table import write_text

FORMAT = "regard familiarity threshold 1"
QUANTILE, LEVEL, DRAWS = 0.05, 0.95, 9999


@dataclass(frozen=True)
class Threshold:
    """A score above which a concept counts as familiar.

    Attributes:
        value: the threshold.
        low, high: 95 % bootstrap interval of what it is made from.
        method: "quantile" or "labelled".
        familiar, unfamiliar: concept -> score, of those it was fitted on.
        settings: of the scores, as `SelfFamiliarity.settings`.
        model: which it was fitted for.
        versions: of torch and transformers.
    """

    value: float
    low: float
    high: float
    method: str
    familiar: Mapping[str, float]
    unfamiliar: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_text(path, json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Threshold:
        """Return what `save` wrote.

        Raises:
            RegardError: for a file that cannot be read or is no threshold.
        """
        try:
            told = json.loads(Path(path).read_text("utf-8"))
            if told.pop("format") != FORMAT:
                raise KeyError("format")
            found = cls(**told)
            if not math.isfinite(found.value):
                raise ValueError(found.value)
        except OSError as failure:
            raise RegardError(f"cannot read {path}: {failure.strerror}.") from failure
        except (ValueError, KeyError, TypeError, AttributeError) as failure:
            raise RegardError(f"{path} holds no threshold that regard saved.") from failure
        return found

    def check(self, known: SelfFamiliarity) -> None:
        """Refuse to be used for scores of another model, or made otherwise.

        Raises:
            RegardError: naming what differs.
        """
        if self.model:
            check_same(self.model, anatomy_of(known.model), "this threshold")
        differing = [name for name, value in known.settings.items() if self.settings.get(name) != value]
        if differing:
            told = ", ".join(
                f"{n} {self.settings.get(n)} there and {known.settings[n]} here" for n in differing
            )
            raise RegardError(f"this threshold was fitted with other settings ({told}); fit one for these.")


def everyday_concepts() -> list[str]:
    """Return the packaged everyday concepts, about 200."""
    return resources.files("regard.data").joinpath("everyday-concepts.txt").read_text("utf-8").splitlines()


def calibrate(
    known: SelfFamiliarity,
    concepts: Sequence[str] | None = None,
    unfamiliar: Sequence[str] = (),
    *,
    resume: str | Path | None = None,
    name: str = "",
) -> Threshold:
    """Fit a threshold on concepts that the model should know, and on some that it cannot know where given.

    Args:
        known: what scores them; the threshold holds for its model and settings alone.
        concepts: familiar ones, ten at least; default `everyday_concepts()`, which takes minutes.
        unfamiliar: unfamiliar ones, two at least, or none.
        resume: a file that keeps the scores found, so that a run that was stopped goes on from there.
        name: what to call the model; default what its config says.

    Raises:
        RegardError: for too few concepts, one on both sides, or a file of another search.
    """
    familiar = known.check_concepts(everyday_concepts() if concepts is None else list(concepts))
    other = known.check_concepts(unfamiliar) if len(unfamiliar) else []
    _check_lists(familiar, other)
    _stats()
    scored = _scored(known, [*familiar, *other], resume)
    told = {concept: scored[concept] for concept in dict.fromkeys(familiar)}
    against = {concept: scored[concept] for concept in dict.fromkeys(other)}
    value, low, high = fit(list(told.values()), list(against.values()))
    versions = {package: version(package) for package in ("torch", "transformers")}
    method = "labelled" if against else "quantile"
    return Threshold(
        value, low, high, method, told, against, known.settings, identify(known.model, name), versions
    )


def fit(familiar: Sequence[float], unfamiliar: Sequence[float] = ()) -> tuple[float, float, float]:
    """Return a threshold for scores, and the interval it comes from.

    Args:
        familiar: scores of familiar concepts.
        unfamiliar: of unfamiliar ones, or none.

    Returns:
        Threshold, and both ends of the 95 % bootstrap interval: of the 5th percentile of `familiar`, whose
        middle the threshold is; or of the threshold itself, where there are unfamiliar ones.
    """
    one, two = np.asarray(familiar, dtype=float), np.asarray(unfamiliar, dtype=float)
    if len(two):
        low, high = _interval((one, two), _best)
        return _best(one, two), low, high
    low, high = _interval((one,), _quantile)
    return (low + high) / 2, low, high


def _quantile(scores: np.ndarray, axis: int = -1) -> Any:
    return np.quantile(scores, QUANTILE, axis=axis)


def _best(familiar: np.ndarray, unfamiliar: np.ndarray) -> float:
    """The middle between two neighbouring scores that tells most right; the least, of several."""
    scores = np.unique(np.concatenate([familiar, unfamiliar]))
    places = np.concatenate([[scores[0] / 2], (scores[1:] + scores[:-1]) / 2])
    right = [(familiar > x).mean() + (unfamiliar <= x).mean() for x in places]
    return float(places[int(np.argmax(right))])


def _interval(samples: tuple[np.ndarray, ...], statistic: Any) -> tuple[float, float]:
    """The 95 % interval, BCa where that is defined for one sample, else of percentiles."""
    stats = _stats()
    alone = len(samples) == 1
    for method in ("BCa", "percentile")[0 if alone else 1 :]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = stats.bootstrap(
                samples, statistic, confidence_level=LEVEL, method=method, vectorized=alone,
                n_resamples=DRAWS if alone else DRAWS // 10, rng=np.random.default_rng(0),
            ).confidence_interval  # fmt: skip
        if math.isfinite(found.low) and math.isfinite(found.high):
            return float(found.low), float(found.high)
    raise RegardError("the scores have no bootstrap interval.")


def _stats() -> Any:
    try:
        return import_module("scipy.stats")
    except ImportError:
        raise RegardError('a threshold is fitted with scipy; run `pip install "regard[study]"`.') from None


def _check_lists(familiar: Sequence[str], unfamiliar: Sequence[str]) -> None:
    if len(set(familiar)) < 10:
        raise RegardError(f"a threshold needs ten familiar concepts at least, not {len(set(familiar))}.")
    if len(set(unfamiliar)) == 1:
        raise RegardError("give two unfamiliar concepts at least, or none.")
    both = set(familiar) & set(unfamiliar)
    if both:
        raise RegardError(f"{sorted(both)[0]!r} cannot be both familiar and unfamiliar.")


def _scored(known: SelfFamiliarity, concepts: Sequence[str], resume: str | Path | None) -> dict[str, float]:
    """Scores of concepts, those kept in a file taken from there."""
    if resume is None:
        return _by_name(known.score_all(concepts))
    asked = {"settings": known.settings, "model": identify(known.model)}
    with Resumable(resume, asked, _fingerprint(known)) as kept:
        found: dict[str, float] = {}
        for concept in concepts:
            told = kept.get(concept)
            if told is not None:
                found[concept] = float(told[0])
        left = [concept for concept in dict.fromkeys(concepts) if concept not in found]
        for batch in known.in_batches(left):
            for each in batch:
                kept.put(each.concept, torch.tensor([each.score]))
                found[each.concept] = each.score
    return found


def _by_name(scored: Sequence[Familiarity]) -> dict[str, float]:
    return {each.concept: each.score for each in scored}


@torch.no_grad()
def _fingerprint(known: SelfFamiliarity) -> torch.Tensor:
    """A few logits, which other weights would not give."""
    ids = torch.tensor([known.prompts.ids(known.prompts.text("What is water?"))])
    return known.model(ids.to(next(known.model.parameters()).device)).logits[0, -1, :8].float().cpu()
