"""Which heads take part in a task, from sparse codes of what they write, beside what simpler scores say.

    sae       mean over trials of `Codes.nodes`: codes that a head shows where the task is present alone
    edges     mean over trials of `Codes.counted`: how often it is an end of the largest edges
    mean_diff || mean positives - mean negatives ||       paired_diff   mean || positive_i - negative_i ||
    norm      mean ||r||          layer   its number      random        drawn

A trial draws a few examples of both kinds together, and trains a dictionary on the vectors of all heads in
them. Nothing is ablated, and no metric is needed; but positives and negatives must differ in the task alone.
The simple scores always stand beside, since where class means differ they tend to find the circuit better.

Source: O'Neill and Bui, 2024, arXiv 2405.12522. Status: agrees with the official code
(`decoder_norm="official"`); the simple scores, `standardise` and the flag are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from regard.errors import RegardError
from regard.lens.circuits.codes import Codes
from regard.lens.circuits.dictionary import Dictionary, check_training, train_dictionary
from regard.lens.circuits.head_results import Given, HeadResults, check_counts, head_results
from regard.runtime.head_table import HeadTable
from regard.runtime.progress import bar

BASELINES = ("mean_diff", "paired_diff", "norm", "layer", "random")
STANDARDS = (None, "head")
Values = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class CircuitScores:
    """What `sae_scores` found.

    Attributes:
        table: columns `sae`, `sae_std` (over trials), `edges`, `edges_std`, those of `BASELINES`, and `dead`,
            the share of prompts in which no code of a head is active, mean over trials.
        codes: of each trial.
        edges: mean over trials of `Codes.edges`, float64 [heads, heads].
        degenerate: how many trials gave one code for everything, so that all heads score 0 in them.
        dead: share of all (prompt, head) in which no code is active.
    """

    table: HeadTable
    codes: tuple[Codes, ...]
    edges: Values
    degenerate: int
    dead: float

    def said(self) -> str:
        """Return in words what is wrong with the codes, or ""."""
        if self.degenerate:
            trials = f"{self.degenerate} of {len(self.codes)} trials"
            return (
                f"in {trials} every head has one code alone, which tells nothing; lower l1, or standardise."
            )
        return f"{self.dead:.0%} of codes are those of no activity; lower l1." if self.dead > 0.5 else ""


def sae_scores(
    model: nn.Module,
    positives: Given,
    negatives: Given,
    *,
    tokenizer: Any = None,
    n_codes: int = 200,
    l1: float = 0.02,
    train_examples: int = 10,
    pool: str = "mean",
    skip_first: bool = False,
    standardise: str | None = None,
    decoder_norm: str = "atom",
    epochs: int = 500,
    normalise: bool = False,
    trials: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> CircuitScores:
    """Score every head of a model by codes that only prompts with a task show, and by simpler means.

    Args:
        model, positives, negatives, tokenizer, pool, skip_first: as for `head_results`.
        n_codes, l1, decoder_norm, epochs: as for `train_dictionary`.
        train_examples: how many prompts a dictionary is trained on, of both kinds together.
        standardise: `head` centres the vectors of each head and gives them mean square 1, so that the
            dictionary is not spent on layers that write much; None leaves them.
        normalise: divide counts by how many codes (pairs) there are.
        trials: how many dictionaries, of other examples and other first weights.
        seed: of all draws.
        progress: whether bars are shown, where stderr is a terminal.

    Raises:
        RegardError: for options out of range, and as `head_results`; before the model is run.

    Example:
        >>> found = sae_scores(model, positives, negatives, tokenizer=tokenizer)    # doctest: +SKIP
        >>> evaluate(found.table, "ioi", column="sae").auc                          # doctest: +SKIP
    """
    check_training(n_codes, l1, epochs, decoder_norm)
    check_counts(len(positives), len(negatives))
    _check(train_examples, len(positives) + len(negatives), standardise, trials)
    results = head_results(
        model, positives, negatives, tokenizer=tokenizer, pool=pool, skip_first=skip_first, progress=progress
    )
    return score_results(
        results, n_codes=n_codes, l1=l1, train_examples=train_examples, standardise=standardise,
        decoder_norm=decoder_norm, epochs=epochs, normalise=normalise, trials=trials, seed=seed,
        progress=progress,
    )  # fmt: skip


def score_results(
    results: HeadResults,
    *,
    n_codes: int = 200,
    l1: float = 0.02,
    train_examples: int = 10,
    standardise: str | None = None,
    decoder_norm: str = "atom",
    epochs: int = 500,
    normalise: bool = False,
    trials: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> CircuitScores:
    """Score heads by vectors that are at hand; arguments as for `sae_scores`."""
    check_training(n_codes, l1, epochs, decoder_norm)
    _check(train_examples, len(results.vectors), standardise, trials)
    vectors = _standardised(results.vectors) if standardise == "head" else results.vectors
    found, dead = [], []
    with bar("Training dictionaries", trials * epochs, progress) as advance:
        for trial in range(trials):
            generator = torch.Generator().manual_seed(seed * 1009 + trial)
            chosen = torch.randperm(len(vectors), generator=generator)[:train_examples]
            rows = vectors[chosen.to(vectors.device)].flatten(0, 1)
            dictionary = train_dictionary(
                rows, n_codes, l1=l1, epochs=epochs, decoder_norm=decoder_norm,
                generator=generator, tick=advance,
            )  # fmt: skip
            codes, silent = codes_of(dictionary, vectors, results, n_codes)
            found.append(codes)
            dead.append(silent)
    return _scores(results, tuple(found), np.stack(dead), normalise, seed)


def codes_of(
    dictionary: Dictionary, vectors: Tensor, results: HeadResults, n_codes: int
) -> tuple[Codes, Values]:
    """Return the codes of all prompts, and the share of prompts in which a head has none, float64 [heads]."""
    values, silent = [], []
    for rows in vectors.split(16):
        most = dictionary.activations(rows).max(-1)
        values.append(most.indices.cpu())
        silent.append((most.values <= 0).cpu())
    codes = Codes(torch.cat(values).numpy(), results.positive.numpy(), results.names, n_codes)
    return codes, torch.cat(silent).double().mean(0).numpy()


def baseline_scores(results: HeadResults, kind: str, *, seed: int = 0) -> Values:
    """Return a score that needs no dictionary, float64 [heads].

    Args:
        kind: one of `BASELINES`; pairs are the n-th positive and the n-th negative prompt.
        seed: of the random one.

    Raises:
        RegardError: for an unknown kind.
    """
    if kind not in BASELINES:
        raise RegardError(f"kind is {kind!r}; it must be one of {', '.join(BASELINES)}.")
    there = results.positive.to(results.vectors.device)
    with_it, without = results.vectors[there], results.vectors[~there]
    if kind == "layer":
        return np.array([float(site.rpartition(".")[2]) for site in results.layers])
    if kind == "random":
        return np.random.default_rng(seed).random(len(results.names))
    vectors = {
        "mean_diff": lambda: (with_it.mean(0) - without.mean(0))[None],
        "paired_diff": lambda: with_it - without,
        "norm": lambda: results.vectors,
    }[kind]()
    return vectors.norm(dim=-1).mean(0).double().cpu().numpy()


def _scores(
    results: HeadResults, codes: tuple[Codes, ...], dead: Values, normalise: bool, seed: int
) -> CircuitScores:
    nodes = np.stack([one.nodes(normalise=normalise) for one in codes])
    counted = np.stack([one.counted(normalise=normalise) for one in codes])
    columns = {
        "sae": nodes.mean(0), "sae_std": nodes.std(0), "edges": counted.mean(0), "edges_std": counted.std(0),
        **{kind: baseline_scores(results, kind, seed=seed) for kind in BASELINES}, "dead": dead.mean(0),
    }  # fmt: skip
    sites, heads = zip(*results.names, strict=True)
    about = {
        "main": sites[0].rpartition(".")[0], "prompts": len(results.positive), "trials": len(codes),
        "definition": "distinct codes that a head shows in positive prompts alone",
    }  # fmt: skip
    degenerate = sum(one.degenerate for one in codes)
    edges = np.mean([one.edges(normalise=normalise) for one in codes], axis=0)
    table = HeadTable(sites, np.array(heads), columns, about)
    return CircuitScores(table, codes, edges, degenerate, float(dead.mean()))


def _standardised(vectors: Tensor) -> Tensor:
    centred = vectors - vectors.mean(0)
    return centred / centred.square().mean((0, 2), keepdim=True).sqrt().clamp_min(1e-12)


def _check(train_examples: int, prompts: int, standardise: str | None, trials: int) -> None:
    if not isinstance(train_examples, int) or not 1 <= train_examples <= prompts:
        raise RegardError(f"train_examples is {train_examples!r}; there are {prompts} prompts.")
    if standardise not in STANDARDS:
        raise RegardError(f"standardise is {standardise!r}; it must be 'head' or None.")
    if not isinstance(trials, int) or trials < 1:
        raise RegardError(f"trials is {trials!r}; it must be a whole number from 1.")
