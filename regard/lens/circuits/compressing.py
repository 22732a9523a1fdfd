"""How few directions of queries and keys heads need to choose a label, and what those directions mean.

`compress` keeps chosen heads to more and more directions, beside as many random ones. `mutate` takes the
directions fitted on labels A to D to other labels and forms: where they stand for "the n-th item of the
list", the mean keys of the n-th label point the same way whatever the letter, and accuracy stays.

Source: Lieberum et al., 2023, arXiv 2307.09458, section 5. Status: partly our choice (the measures).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from regard.errors import RegardError
from regard.lens.circuits.choice_roles import LastRow
from regard.lens.circuits.choosing import net_of
from regard.lens.circuits.subspaces import Subspaces, fit_subspaces
from regard.runtime.anatomy import anatomy_of, root_of
from regard.runtime.head_table import Head, HeadName
from regard.runtime.progress import bar
from regard.runtime.protocol import Stage
from regard.runtime.session import Session
from regard.runtime.table import Table
from regard.tasks.questions import Choices, Question, Style, choices

RANKS = (0, 1, 2, 3, 4, 8, None)
FORMS: Mapping[str, tuple[str, Style]] = {
    "A to D": ("ABCD", Style()),
    "letters after A": ("next", Style()),
    "random letters": ("random", Style()),
    "A to D shuffled": ("shuffled", Style()),
    "numbers": ("1234", Style()),
    "other separators": ("ABCD", Style(before="", after=". ")),
    "no preamble": ("ABCD", Style(preamble=False)),
}


def fit_choices(
    model: nn.Module, asked: Choices, heads: Iterable[HeadName], components: Sequence[str] = ("query", "key")
) -> Subspaces:
    """Fit the directions of heads at the last position and at the labels, over prompts of any lengths.

    Raises:
        RegardError: for fewer than two prompts, and as `fit_subspaces`.
    """
    groups = asked.by_length()
    return fit_subspaces(
        model, [{"input_ids": torch.stack([asked.ids[i] for i in rows])} for rows in groups], heads,
        queries=[asked.ends[rows] for rows in groups], keys=[asked.label_places[rows] for rows in groups],
        components=components,
    )  # fmt: skip


def compress(
    model: nn.Module,
    asked: Choices,
    heads: Iterable[HeadName],
    *,
    fitted: Subspaces | None = None,
    ranks: Sequence[int | None] = RANKS,
    components: Sequence[str] = ("query", "key"),
    draws: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> Table:
    """Keep heads to some directions, and measure how the model chooses among the labels.

    Args:
        model: a causal language model in evaluation mode.
        asked: prompts to measure on.
        heads: (layer, head) each, all compressed together.
        fitted: directions from other prompts, by `fit_choices`; default from these.
        ranks: how many directions; None for all there are. Those that the heads do not have are left out.
        components: any of `query`, `key`, `value`.
        draws: how many random sets of directions stand beside each rank; 0 for none.
        seed: of the draws.

    Returns:
        A row a rank: `rank`, `accuracy`, `net`, `attention` (mean |change| of the heads' weights from the
        last position to the labels), and `random_accuracy`, `random_net` (means) and `random_best_net` of the
        draws.

    Raises:
        RegardError, NoSuchSite, UnsupportedModel: as `fit_subspaces`.
    """
    anatomy = anatomy_of(root_of(model))
    chosen = [(anatomy.check_head(layer, head).alias, head) for layer, head in heads]
    basis = fit_choices(model, asked, chosen, components) if fitted is None else fitted
    most = min(basis.directions[h, c].shape[1] for h in chosen for c in components)
    wanted = [r for r in ranks if r is None or r <= most]
    plain = _looked(model, asked, chosen, None, None, components)
    rows: list[dict[str, Any]] = []
    with bar("Compressing", len(wanted) * (1 + draws), progress) as advance:
        for rank in wanted:
            found = _looked(model, asked, chosen, basis, rank, components)
            advance(1)
            row = {
                "rank": most if rank is None else rank, **_scored(found[0], asked),
                "attention": float((found[1] - plain[1]).abs().mean()),
            }  # fmt: skip
            drawn = []
            for number in range(draws):
                other = basis.random(seed + number)
                drawn.append(_scored(_looked(model, asked, chosen, other, rank, components)[0], asked))
                advance(1)
            rows.append(row | _control(drawn))
    return Table({name: [row[name] for row in rows] for name in rows[0]})


def mutate(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    heads: Iterable[HeadName],
    *,
    rank: int = 3,
    forms: Mapping[str, tuple[str, Style]] = FORMS,
    seed: int = 0,
) -> Table:
    """Take the directions fitted on the first form of some questions to their other forms.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: of transformers.
        questions: asked in every form.
        heads: (layer, head) each.
        rank: how many directions.
        forms: name -> labels and style, as `choices` takes them; a form whose labels the tokenizer splits is
            left out.
        seed: of labels.

    Returns:
        A row a form: `form`, `accuracy` and `net` as the model is, `kept_accuracy` and `kept_net` with the
        heads kept to the directions of the first form, `same` and `other`, the mean cosine of its key
        centroids with those of the first form, of the same place and of other places.

    Raises:
        RegardError: where the first form cannot be written, and as `fit_subspaces`.
    """
    names = list(heads)
    first, rows = None, []
    for form, (labels, style) in forms.items():
        try:
            asked = choices(tokenizer, questions, labels=labels, style=style, seed=seed)
        except RegardError:
            if first is None:
                raise
            continue
        basis = fit_choices(model, asked, names)
        first = basis if first is None else first
        plain, kept = (
            _scored(_looked(model, asked, basis.heads, using, rank, ("query", "key"))[0], asked)
            for using in (None, first)
        )
        same, other = aligned(first, basis)
        rows.append({
            "form": form, **plain, "kept_accuracy": kept["accuracy"], "kept_net": kept["net"], "same": same,
            "other": other,
        })  # fmt: skip
    return Table({name: [row[name] for row in rows] for name in rows[0]})


def aligned(first: Subspaces, second: Subspaces) -> tuple[float, float]:
    """Return the mean cosine of two sets' key centroids of the same place, and of other places."""
    same, other = [], []
    for head in first.heads:
        one, two = (basis.centroids(head, "key") for basis in (first, second))
        cosines = cosine_similarity(one[:, None], two[None], dim=-1)
        own = torch.eye(len(one), dtype=torch.bool)
        same.append(cosines[own].mean())
        other.append(cosines[~own].mean())
    return float(torch.stack(same).mean()), float(torch.stack(other).mean())


def _looked(
    model: nn.Module, asked: Choices, heads: Sequence[Head], basis: Subspaces | None, rank: int | None,
    components: Sequence[str],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The labels' logits [N, options], and the heads' weights on the labels [N, heads, options]."""
    said, looks, order = [], [], []
    device = next(model.parameters()).device
    for rows in asked.by_length():
        ids, places = torch.stack([asked.ids[i] for i in rows]), asked.label_places[rows]
        stages: list[Stage] = [LastRow(keys={"labels": places})]
        if basis is not None:
            ends = asked.ends[rows]
            stages.append(basis.edit(rank, queries=ends, keys=places, components=components, heads=heads))
        with torch.no_grad(), Session(model, stages) as session:
            logits = model(input_ids=ids.to(device), use_cache=False).logits[:, -1].float().cpu()
        seen = session[LastRow]
        said.append(logits.gather(1, asked.label_ids[rows]))
        looks.append(torch.stack([seen[alias]["labels"][:, head] for alias, head in heads], 1))
        order += rows
    back = torch.tensor(order).argsort()
    return torch.cat(said)[back], torch.cat(looks)[back]


def _scored(labels: Tensor, asked: Choices) -> dict[str, float]:
    right = labels.argmax(1) == asked.right
    return {"accuracy": float(right.float().mean()), "net": float(net_of(labels, asked.right).mean())}


def _control(drawn: Sequence[Mapping[str, float]]) -> dict[str, float]:
    if not drawn:
        return {}
    nets = [each["net"] for each in drawn]
    return {
        "random_accuracy": sum(each["accuracy"] for each in drawn) / len(drawn),
        "random_net": sum(nets) / len(nets),
        "random_best_net": max(nets),
    }
