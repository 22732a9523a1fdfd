"""Planted circuits for the study of sparse codes, and how its scores are kept and held against a circuit."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard.lens.circuits.codes import Values
from regard.lens.circuits.evaluation import evaluate, members, within_layer_auc
from regard.lens.circuits.head_results import HeadResults
from regard.lens.circuits.sae import BASELINES, CircuitScores, score_results
from regard.runtime.head_statistics import auc
from regard.runtime.head_table import HeadName, HeadTable

HEADS, MEMBERS, WIDTH, ATOMS, NOISE = 40, 8, 32, 6, 0.1
PLANTED: dict[str, Any] = {"n_codes": 100, "l1": 0.02, "epochs": 300}
SIMPLE = {"mean_diff": "diff", "layer": "layer", "norm": "norm"}


def planted(kind: str, prompts: int, seed: int) -> tuple[HeadResults, list[HeadName]]:
    """Return vectors of heads of which eight show a task, and these eight.

    Every head has atoms of its own and shows one of them a prompt, with noise. In negative prompts the eight
    show some of theirs alone. Where `kind` is `means` the atoms are any, so that class means differ; where it
    is `signs`, they are three and their opposites, so that all means are 0.
    """
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.randn(HEADS, ATOMS, WIDTH, generator=generator)
    if kind == "signs":
        atoms[:, 1::2] = -atoms[:, ::2]
    positive = torch.arange(2 * prompts) < prompts
    chosen = torch.randint(ATOMS, (2 * prompts, HEADS), generator=generator)
    inside = torch.zeros(HEADS, dtype=torch.bool)
    inside[torch.randperm(HEADS, generator=generator)[:MEMBERS]] = True
    where = ~positive[:, None] & inside
    chosen[where] = chosen[where] % (3 if kind == "means" else 2)
    shown = atoms[torch.arange(HEADS), chosen]
    vectors = shown + NOISE * torch.randn(shown.shape, generator=generator)
    names = tuple((f"text.{n // 4}", n % 4) for n in range(HEADS))
    return HeadResults(vectors, positive, names), [names[i] for i in inside.nonzero()[:, 0].tolist()]


def shuffled(positive: Tensor, seed: int) -> Tensor:
    """Return labels drawn anew, as many of each kind."""
    return positive[torch.randperm(len(positive), generator=torch.Generator().manual_seed(seed))]


def relabelled(found: CircuitScores, positive: Tensor) -> Values:
    """Return the mean node scores under other labels; the dictionaries stay."""
    return np.mean([replace(codes, positive=positive.numpy()).nodes() for codes in found.codes], axis=0)


def planted_aucs(kind: str, prompts: int, seed: int) -> dict[str, float]:
    """Return the AUC of codes, of the difference of means, and of codes with labels shuffled."""
    results, circuit = planted(kind, prompts, seed)
    found = score_results(results, trials=1, seed=seed, progress=False, **PLANTED)
    inside = members(found.table, circuit)
    control = relabelled(found, shuffled(results.positive, seed))
    scores = {"sae": found.table["sae"], "diff": found.table["mean_diff"], "shuffled": control}
    return {name: auc(x[inside], x[~inside]) for name, x in scores.items()}


def scored(results: HeadResults, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return scores of one dictionary, of shuffled labels and of simple means, plain values a head."""
    begun = time.perf_counter()
    found = score_results(results, trials=1, seed=seed, progress=False, **options)
    columns = {name: found.table[name] for name in ("sae", "edges", *BASELINES)}
    columns["shuffled"] = relabelled(found, shuffled(results.positive, seed))
    return {
        "names": [list(name) for name in results.names],
        "columns": {name: [float(f"{x:.6g}") for x in values] for name, values in columns.items()},
        "dead": found.dead, "degenerate": found.degenerate, "seconds": time.perf_counter() - begun,
    }  # fmt: skip


def table_of(kept: Mapping[str, Any]) -> HeadTable:
    """Return what `scored` kept as a table."""
    sites, heads = zip(*kept["names"], strict=True)
    return HeadTable(sites, np.array(heads), kept["columns"], {"main": "text"})


def areas(kept: Mapping[str, Any], circuit: Iterable[HeadName]) -> dict[str, float]:
    """Return the AUC of every column, and `within_NAME`, that over pairs of one layer."""
    table = table_of(kept)
    inside = members(table, [tuple(head) for head in circuit])  # type: ignore[misc]
    found = {name: auc(x[inside], x[~inside]) for name, x in table.columns.items()}
    return found | {
        f"within_{name}": within_layer_auc(x, inside, table.sites) for name, x in table.columns.items()
    }


def measured(
    results: Mapping[str, Any], kinds: Iterable[str], tasks: Iterable[str], variants: Iterable[str]
) -> dict[str, list[float]]:
    """Return the values of every quantity."""
    found: dict[str, list[float]] = {}
    for kind in kinds:
        draws = [told for step, told in results.items() if step.startswith(f"planted, {kind}, ")]
        found.update({f"{kind}_{name}": [d[name] for d in draws] for name in ("sae", "diff", "shuffled")})
    for task in tasks:
        circuit = results[f"paths, {task}"]["heads"]
        sets = sets_of(results, task)
        plain = [areas(told["plain"], circuit) for told in sets]
        names = {"sae": "sae", "edges": "edges", "shuffled": "shuffled", **SIMPLE,
                 "within_sae": "within", "within_shuffled": "within_shuffled",
                 "within_mean_diff": "within_diff"}  # fmt: skip
        found.update({f"{task}_{to}": [each[name] for each in plain] for name, to in names.items()})
    circuit = results["paths, ioi"]["heads"]
    for variant in variants:
        each = [areas(told[variant], circuit) for told in sets_of(results, "ioi")]
        found[f"ioi_{variant}"] = [one["sae"] for one in each]
        if variant == "standard":
            found["ioi_within_standard"] = [one["within_sae"] for one in each]
    return found


def sets_of(results: Mapping[str, Any], task: str) -> list[Any]:
    """Return the results of a task's prompt sets."""
    return [told for step, told in results.items() if step.startswith(f"codes, {task}, ")]


def told(results: Mapping[str, Any], tasks: Iterable[str]) -> dict[str, Any]:
    """Return what the picture and the page need beside the measures."""
    found: dict[str, Any] = {}
    for task in tasks:
        paths, sets = results[f"paths, {task}"], sets_of(results, task)
        circuit = [tuple(head) for head in paths["heads"]]
        table = table_of(sets[0]["plain"])
        ways = {name: evaluate(table, circuit, column=name) for name in ("sae", "mean_diff", "layer")}
        found[task] = {
            "circuit": paths["heads"],
            "roc": {name: way.roc.round(4).tolist() for name, way in ways.items()},
            "f1": {name: way.f1 for name, way in ways.items()},
            "average_precision": {name: way.average_precision for name, way in ways.items()},
            "dead": [one["plain"]["dead"] for one in sets],
            "degenerate": sum(one["plain"]["degenerate"] for one in sets),
            "seconds": {
                "paths": paths["seconds"], "read": [one["read_seconds"] for one in sets],
                "codes": [one["plain"]["seconds"] for one in sets],
            },
        }  # fmt: skip
    return found
