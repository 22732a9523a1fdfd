"""The methods by name, and `explain`: scores of the tokens of one text by one of them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from regard.errors import RegardError, UnsupportedModel
from regard.lens.explanations import attribution
from regard.lens.explanations.attention import LONGEST_FLOW, paths_of
from regard.lens.explanations.subject import Subject, Target, subject_of
from regard.runtime.table import Table

Values = npt.NDArray[np.float64]
REDUCTION = "products of gradients are summed over the embedding's width, and the absolute value is ranked"


class Method(NamedTuple):
    """A way to score tokens.

    Attributes:
        about: what it is, in a few words.
        run: from a subject and options to an `Attribution`; None for those of attention.
        chance: whether it draws, so that another seed gives other scores.
        attention: (aggregate, kind) of a transformer's attention; None for attributions.
    """

    about: str
    run: Callable[..., attribution.Attribution] | None = None
    chance: bool = False
    attention: tuple[str, str] | None = None


METHODS: Mapping[str, Method] = {
    "gradxinput": Method("gradient times input", attribution.gradxinput),
    "gradnorm": Method("norm of the gradient", attribution.gradnorm),
    "ig": Method("integrated gradients", attribution.integrated_gradients),
    "gradshap": Method("gradients at random points of noised inputs", attribution.gradient_shap, True),
    "deeplift": Method("rescale rule against the baseline", attribution.deeplift),
    "deepshap": Method("rescale rule against random baselines", attribution.deep_shap, True),
    "occlusion": Method("fall of the output without the token", attribution.occlusion),
    "lime": Method("linear model of which tokens are kept", attribution.lime, True),
    "average": Method("attention, mean of layers and heads", attention=("average", "weights")),
    "rollout": Method("attention multiplied through the layers", attention=("rollout", "weights")),
    "flow": Method("maximum flow through attention", attention=("flow", "weights")),
    "norm": Method("average, weighed by norms of values", attention=("average", "norm")),
    "norm-rollout": Method("rollout, weighed by norms of values", attention=("rollout", "norm")),
    "norm-flow": Method("flow, weighed by norms of values", attention=("flow", "norm")),
}
ATTENTION = tuple(name for name, method in METHODS.items() if method.attention)
ATTRIBUTIONS = tuple(name for name in METHODS if name not in ATTENTION)
COMPARED = (
    "gradnorm",
    "gradxinput",
    "ig",
    "gradshap",
    "deeplift",
    "occlusion",
    "lime",
    "average",
    "norm",
    "rollout",
    "flow",
)


@dataclass(frozen=True, eq=False)
class Explanation:
    """Scores of the tokens of one text.

    Attributes:
        method: its name in `METHODS`.
        tokens: n texts.
        values: signed where the method is, float64 [n].
        target: what was explained, in words.
        value, value_baseline: F of the text, and of the baseline at every position.
        error: sum of the scores - (F(e) - F(e0)), of methods whose scores should sum to that; else None.
        settings: samples, steps and seed, where there are such.
        special: which tokens the tokenizer added, bool [n].
    """

    method: str
    tokens: tuple[str, ...]
    values: Values
    target: str
    value: float
    value_baseline: float
    error: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    special: tuple[bool, ...] = ()

    @property
    def scores(self) -> Values:
        """What is ranked: absolute values, float64 [n]."""
        return np.abs(self.values)

    @property
    def converged(self) -> bool:
        """False for integrated gradients whose error is 5 % of F(e) - F(e0) or more: do not rank them."""
        room = attribution.CONVERGED * abs(self.value - self.value_baseline) + 1e-7
        return self.method != "ig" or self.error is None or abs(self.error) <= room

    @property
    def table(self) -> Table:
        """One row a token."""
        columns = {"position": range(len(self.tokens)), "token": self.tokens, self.method: self.values}
        return Table(columns)

    def said(self) -> str:
        """Return in words what was explained, and how far the sum is off."""
        error = "" if self.error is None else f"; completeness error {self.error:.3g}"
        rest = "" if self.converged else " (5 % or more: not to be ranked)"
        whole = f"{self.value:.3g}, and {self.value_baseline:.3g} at the baseline"
        return f"{self.method} of the {self.target}: {whole}{error}{rest}"

    def __str__(self) -> str:
        return f"{self.said()}\n\n{self.table}"

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


def explain(
    model: Any,
    tokenizer: Any,
    text: Any,
    method: str = "ig",
    target: Target = "predicted",
    *,
    baseline: Any = "pad",
    of: str | None = None,
    samples: int | None = None,
    steps: int = attribution.STEPS,
    most_steps: int = attribution.MOST_STEPS,
    seed: int = 0,
) -> Explanation:
    """Score the tokens of a text by one method.

    Args:
        model: a classifier of sequences or a causal language model that takes `inputs_embeds`, in
            evaluation mode and float32.
        tokenizer: its tokenizer; None where `text` is ids.
        text: words or token ids [n]; padding is taken out, special tokens are kept.
        method: a name in `METHODS`.
        target: "predicted", a class or next token by number or name, or two to be subtracted.
        baseline: what a removed token becomes: "pad", "zero", a token, or an embedding [d].
        of: "probability" (default of classifiers) or "logit" (default of language models).
        samples: of lime, default 1000; gradshap and deepshap take 5.
        steps, most_steps: of ig, whose steps are doubled up to `most_steps` until its error is below 5 %.
        seed: of what is drawn; the caller's random state stays as it was.

    Raises:
        UnsupportedModel: where the model, or a method on it, cannot be computed: attention out of reach,
            non-linearities without a rule of DeepLIFT.
        RegardError: for a bad text, target, baseline or option, and where Captum is missing.

    Example:
        >>> explain(model, tokenizer, "The cat sat on the", "occlusion", " mat")    # doctest: +SKIP
    """
    check_methods([method])
    check_options(samples=samples, steps=steps, most_steps=most_steps, seed=seed)
    subject = subject_of(model, tokenizer, text, target, baseline=baseline, of=of)
    return Explainer(subject, samples, steps, most_steps).of(method, seed)


def check_methods(names: Sequence[str]) -> None:
    """Refuse a method that is not known, and none at all.

    Raises:
        RegardError: naming the nearest.
    """
    if not names:
        raise RegardError(f"no method was named; there are {', '.join(METHODS)}.")
    for name in names:
        if name not in METHODS:
            near = difflib.get_close_matches(str(name), METHODS, 2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(METHODS)}."
            raise RegardError(f"no method {name!r}; {hint}")


def check_options(**counts: int | None) -> None:
    """Refuse options that are no counts; all from 1 but `seed`, which may be 0.

    Raises:
        RegardError: naming the option.
    """
    for name, value in counts.items():
        least = 0 if name == "seed" else 1
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise RegardError(f"{name} is {value!r}; it must be a whole number from {least}.")


class Explainer:
    """All methods on one subject; one forward serves all methods of attention.

    Args:
        subject: what is explained.
        samples, steps, most_steps: as for `explain`.
    """

    def __init__(
        self,
        subject: Subject,
        samples: int | None = None,
        steps: int = attribution.STEPS,
        most_steps: int = attribution.MOST_STEPS,
    ) -> None:
        self.subject = subject
        self.samples = {} if samples is None else {"samples": samples}
        self.steps = {"steps": steps, "most_steps": most_steps}
        self._attention: dict[tuple[str, str], Tensor] = {}

    def of(self, name: str, seed: int = 0) -> Explanation:
        """Return the scores by one method; see `explain`."""
        method, subject = METHODS[name], self.subject
        error: float | None = None
        settings: dict[str, Any] = {}
        if method.run is not None:
            options = {**self.steps, **self.samples_of(name)}
            found, error, settings = method.run(subject, seed=seed, **options)
        else:
            assert method.attention is not None
            found = self._by_attention(*method.attention)
        return Explanation(
            name, subject.tokens, found.numpy(), subject.target, subject.value, subject.value_baseline,
            error, settings, subject.special,
        )  # fmt: skip

    def samples_of(self, name: str) -> dict[str, int]:
        """Return the samples asked for, of lime alone: the others take five."""
        return self.samples if name == "lime" else {}

    def _by_attention(self, aggregate: str, kind: str) -> Tensor:
        if not self._attention:
            self._attention = self._own() or self._followed()
        if (aggregate, kind) in self._attention:
            return self._attention[aggregate, kind]
        name, length = type(self.subject.model).__name__, len(self.subject.tokens)
        if aggregate == "flow" and length > LONGEST_FLOW:
            raise RegardError(f"flow takes texts of up to {LONGEST_FLOW} tokens, and this has {length}.")
        raise UnsupportedModel(
            f"{name} has one layer of attention over its tokens, so there is no {aggregate}."
        )

    def _own(self) -> dict[tuple[str, str], Tensor]:
        """Of a model that gives one weight a token itself, as recurrent ones with additive attention do."""
        with torch.no_grad():
            out = self.subject.model(input_ids=self.subject.ids)
        weights, states = getattr(out, "token_attention", None), getattr(out, "states", None)
        if not isinstance(weights, Tensor):
            return {}
        found = {("average", "weights"): weights[0].double().cpu()}
        if isinstance(states, Tensor):
            found["average", "norm"] = (weights[0] * states[0].norm(dim=-1)).double().cpu()
        return found

    def _followed(self) -> dict[tuple[str, str], Tensor]:
        subject = self.subject
        short = len(subject.tokens) <= LONGEST_FLOW
        paths = paths_of(subject.model, {"input_ids": subject.ids}, keep=short)
        wanted = [METHODS[name].attention for name in ATTENTION]
        return {
            pair: paths.scores(*pair)[0].cpu()
            for pair in wanted
            if pair is not None and (short or pair[0] != "flow")
        }
