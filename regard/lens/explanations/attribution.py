"""Scores of tokens by gradients and by masking, computed by Captum on the embeddings of a subject.

    gradxinput   e . grad F(e)
    gradnorm     ||grad F(e)||_2
    ig           (e - e0) . integral over a of grad F(e0 + a (e - e0))        Gauss-Legendre
    gradshap     the same at random points between e0 and e with noise, averaged
    deeplift     multipliers of the rescale rule against e0; deepshap averages them over random baselines
    occlusion    F(e) - F(e with token i replaced by its baseline)
    lime         weights of a ridge regression of F on which tokens are kept, over random masks

Products are summed over the embedding's width, so that every token has one signed score. Sources: Simonyan et
al., 2014; Sundararajan et al., 2017; Lundberg and Lee, 2017; Shrikumar et al., 2017; Ribeiro et al., 2016,
by the implementations of Captum 0.9. Status: agrees with Captum; partly our choice: noise of gradshap is a
tenth of the embeddings' standard deviation, and the baselines of deepshap are tokens drawn at random.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from regard.errors import RegardError, UnsupportedModel, first_sentence
from regard.lens.explanations.subject import Subject

NOISE = 0.1
CONVERGED = 0.05
STEPS, MOST_STEPS = 50, 200


class Attribution(NamedTuple):
    """Signed scores float64 [n], the completeness error where the method has one, and what was set."""

    scores: Tensor
    error: float | None
    settings: dict[str, Any]


def captum() -> Any:
    """Return `captum.attr`.

    Raises:
        RegardError: where it is not installed.
    """
    try:
        import captum.attr as found
    except ImportError as missing:
        raise RegardError('explanations need Captum; run `pip install "regard[explain]"`.') from missing
    return found


def gradxinput(subject: Subject, **_: Any) -> Attribution:
    found = captum().InputXGradient(subject.score).attribute(_leaf(subject))
    return Attribution(_summed(found), None, {})


def gradnorm(subject: Subject, **_: Any) -> Attribution:
    found = captum().Saliency(subject.score).attribute(_leaf(subject), abs=False)
    return Attribution(found[0].detach().double().cpu().norm(dim=-1), None, {})


def integrated_gradients(
    subject: Subject, *, steps: int = STEPS, most_steps: int = MOST_STEPS, **_: Any
) -> Attribution:
    """Double the steps until the completeness error is below 5 % of F(e) - F(e0), up to a most."""
    method = captum().IntegratedGradients(subject.score)
    taken = steps
    while True:
        found, error = method.attribute(
            _leaf(subject), baselines=subject.baseline, n_steps=taken, method="gausslegendre",
            internal_batch_size=subject.rows, return_convergence_delta=True,
        )  # fmt: skip
        if converged(subject, float(error)) or taken >= most_steps:
            return Attribution(_summed(found), float(error), {"steps": taken})
        taken = min(2 * taken, most_steps)


def gradient_shap(subject: Subject, *, samples: int = 5, seed: int = 0, **_: Any) -> Attribution:
    method = captum().GradientShap(subject.score)
    with _seeded(seed):
        found = method.attribute(
            _leaf(subject), baselines=subject.baseline, n_samples=samples,
            stdevs=NOISE * float(subject.embedded.std()),
        )  # fmt: skip
    return Attribution(_summed(found), _error(subject, found), {"samples": samples, "seed": seed})


def deeplift(subject: Subject, **_: Any) -> Attribution:
    found = _by_rules(subject, captum().DeepLift, subject.baseline)
    return Attribution(_summed(found), _error(subject, found), {})


def deep_shap(subject: Subject, *, samples: int = 5, seed: int = 0, **_: Any) -> Attribution:
    table = cast(Tensor, subject.model.get_input_embeddings().weight)  # type: ignore[operator]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(table), (samples, subject.embedded.shape[1]), generator=generator)
    baselines = table.detach()[drawn.to(table.device)]
    found = _by_rules(subject, captum().DeepLiftShap, baselines)
    with torch.no_grad():
        expected = float(subject.score(baselines).double().mean())
    error = float(found.double().sum()) - (subject.value - expected)
    return Attribution(_summed(found), error, {"samples": samples, "seed": seed})


def occlusion(subject: Subject, **_: Any) -> Attribution:
    found = captum().FeatureAblation(subject.score).attribute(
        subject.embedded, baselines=subject.baseline, feature_mask=_one_each(subject),
        perturbations_per_eval=subject.rows,
    )  # fmt: skip
    return Attribution(_equal_over_width(found), None, {})


def lime(subject: Subject, *, samples: int = 1000, seed: int = 0, **_: Any) -> Attribution:
    from captum._utils.models.linear_model import SkLearnRidge

    method = captum().Lime(subject.score, interpretable_model=SkLearnRidge())
    with _seeded(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = method.attribute(
            subject.embedded, baselines=subject.baseline, feature_mask=_one_each(subject), n_samples=samples,
            perturbations_per_eval=subject.rows,
        )  # fmt: skip
    return Attribution(_equal_over_width(found), None, {"samples": samples, "seed": seed})


def converged(subject: Subject, error: float) -> bool:
    """Whether a completeness error is below 5 % of F(e) - F(e0)."""
    return abs(error) <= CONVERGED * abs(subject.value - subject.value_baseline) + 1e-7


def _by_rules(subject: Subject, kind: Any, baselines: Tensor) -> Tensor:
    """DeepLIFT, refused where its sum shows that some non-linearity had no rule."""
    name = type(subject.model).__name__
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = kind(subject.score).attribute(_leaf(subject), baselines=baselines)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UnsupportedModel(f"DeepLIFT does not run on {name} ({first_sentence(error)}).") from error
    with torch.no_grad():
        difference = subject.value - float(subject.score(baselines).double().mean())
    off = abs(float(found.detach().double().sum()) - difference)
    if off > 0.01 * abs(difference) + 1e-5:
        raise UnsupportedModel(
            f"DeepLIFT has no rule for some non-linearity of {name}: its scores sum to {off:.3g} beside "
            f"F(e) - F(e0) = {difference:.3g} (functional softmax, gates and norms have none)."
        )
    return found.detach()


def _leaf(subject: Subject) -> Tensor:
    return subject.embedded.detach().clone().requires_grad_()


def _summed(found: Tensor) -> Tensor:
    return found[0].detach().double().sum(-1).cpu()


def _equal_over_width(found: Tensor) -> Tensor:
    return found[0].detach().double().mean(-1).cpu()


def _error(subject: Subject, found: Tensor) -> float:
    return float(found.detach().double().sum()) - (subject.value - subject.value_baseline)


def _one_each(subject: Subject) -> Tensor:
    """Captum's feature mask: every token is one feature, [1, n, 1]."""
    return torch.arange(len(subject.tokens), device=subject.embedded.device)[None, :, None]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch and numpy, from both of which Captum draws, and put their states back afterwards."""
    state = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            np.random.set_state(state)
