"""Which heads ACT helps: each calibrated by itself, on labelled prompts, and kept where the score rises.

    gain_h = mean_n score_n(ACT in head h alone) - mean_n score_n(model as it is)

With many heads and few prompts some gain by chance: `halves` tells how far two halves of the prompts rank
the heads alike, and a test on other prompts is needed before anything is said of the heads kept.

Blocks before the head's own give what they gave, so that a head costs the blocks from its own on; a head that
has no hidden sink in any of the prompts is left as it is, changes nothing, and costs nothing.

Source: Yu et al., 2024, arXiv 2406.15765, section 4 (head filtering). Status: partly our choice: the official
code prints the scores and leaves the choice to the reader.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from regard.edit.act.calibration import ACT
from regard.edit.act.hidden import sink_map
from regard.errors import RegardError
from regard.runtime.anatomy import anatomy_of, require_attention, root_of
from regard.runtime.edits.targets import HeadName
from regard.runtime.head_table import Head, HeadTable
from regard.runtime.paths import halves_agree
from regard.runtime.progress import bar
from regard.runtime.replay import Replay
from regard.runtime.resumable import Resumable
from regard.runtime.sides import Scored, scored
from regard.runtime.table import finite


@dataclass(frozen=True, eq=False)
class FilteredHeads:
    """What `filter_heads` found.

    Attributes:
        heads: columns `gain`, over the model as it is, and `spread`, the standard deviation over prompts;
            `about` has the score without ACT, `plain`, the number of prompts, and `halves`.
        edit: ACT as it was tried.
        changes: of the score of each prompt, float32 [heads, N].
    """

    heads: HeadTable
    edit: ACT
    changes: Tensor

    def chosen(self, least: float = 0.0) -> list[Head]:
        """Return the heads whose gain is above `least`, the largest first."""
        ranked = self.heads.top("gain", max(1, len(self.heads)))
        return [(site, head) for site, head, gain in ranked if gain > least]

    def by_chance(self, least: float = 0.0, draws: int = 1000) -> tuple[float, int]:
        """Return how many heads would be kept if ACT did no more good than harm.

        The signs of a prompt's changes are turned over in half of `draws` draws, in all heads together, so
        that what heads have in common stays. The draws are always the same.

        Returns:
            The mean, and the number that one draw in twenty exceeds.
        """
        signs = torch.randint(
            0, 2, (self.changes.shape[1], draws), generator=torch.Generator().manual_seed(0)
        )
        gains = self.changes.double() @ (2.0 * signs - 1).double() / self.changes.shape[1]
        counts = (gains > least + 1e-12).sum(0).double()
        return float(counts.mean()), int(counts.quantile(0.95))

    def act(self, least: float = 0.0) -> ACT:
        """Return ACT in the heads whose gain is above `least`.

        Raises:
            RegardError: where there are none.
        """
        heads = self.chosen(least)
        if not heads:
            raise RegardError(f"no head gains more than {least:g}, so there is none to calibrate.")
        return replace(self.edit, heads=heads)


def filter_heads(
    model: nn.Module,
    inputs: Mapping[str, Any],
    score: Scored,
    *,
    edit: ACT | None = None,
    heads: Sequence[HeadName] | None = None,
    progress: bool = True,
    save: str | Path | None = None,
) -> FilteredHeads:
    """Try ACT in one head at a time.

    Args:
        model: a causal language model in evaluation mode, or an image-text model with such a decoder.
        inputs: keyword arguments of its forward, N prompts, padded on the left where lengths differ.
        score: takes logits [N, V] at the last position; returns [N], such as 1 where the answer is right.
        edit: ACT with its options; default `ACT()`.
        heads: `(layer, head)` pairs to try; default those that `edit` is for.
        progress: whether a bar is shown, where stderr is a terminal.
        save: a file that keeps what is finished. The same search, started again, goes on from there.

    Raises:
        RegardError: for one prompt only, no heads, or a file of `save` that holds something else.
        ShapeMismatch: for a score of another shape.
        UnsupportedModel: for a model whose blocks cannot be replayed.

    Example:
        >>> found = filter_heads(model, inputs, right)                          # doctest: +SKIP
        >>> with regard.steer(model, found.act()):                              # doctest: +SKIP
        ...     model.generate(**inputs)
    """
    return filter_batches(model, [(inputs, score)], edit=edit, heads=heads, progress=progress, save=save)


def filter_batches(
    model: nn.Module,
    batches: Sequence[tuple[Mapping[str, Any], Scored]],
    *,
    edit: ACT | None = None,
    heads: Sequence[HeadName] | None = None,
    progress: bool = True,
    save: str | Path | None = None,
) -> FilteredHeads:
    """Try ACT in one head at a time, on batches of prompts that each have a score of their own.

    Memory is that of one batch, of which every block's output is kept. Arguments are those of `filter_heads`.
    """
    asked = edit or ACT()
    root = root_of(model)
    anatomy = anatomy_of(root)
    require_attention(anatomy)
    count = sum(len(inputs["input_ids"]) for inputs, _ in batches)
    if count < 2:
        raise RegardError("one prompt cannot tell which heads to calibrate; give two at least.")
    names = asked.each(anatomy) if heads is None else replace(asked, heads=heads, layers=None).each(anatomy)
    tried = replace(asked, heads=None, layers=None)
    changes, plain = [], []
    with bar("Trying heads", len(names) * len(batches), progress) as advance:
        for inputs, score in batches:
            before, change = _changes(root, inputs, score, tried, names, save, advance)
            plain.append(before)
            changes.append(change)
    each = torch.cat(changes, 1)
    about = {
        "plain": float(torch.cat(plain).mean()), "prompts": count, "halves": finite(halves_agree(each)),
        "main": anatomy.main, "definition": "gain of the score where ACT calibrates this head alone",
    }  # fmt: skip
    columns = {"gain": each.double().mean(1).numpy(), "spread": each.double().std(1, correction=0).numpy()}
    numbers = np.array([head for _, head in names])
    return FilteredHeads(HeadTable(tuple(site for site, _ in names), numbers, columns, about), tried, each)


def _changes(
    root: nn.Module,
    inputs: Mapping[str, Any],
    score: Scored,
    tried: ACT,
    names: Sequence[Head],
    save: str | Path | None,
    advance: Callable[[int], None],
) -> tuple[Tensor, Tensor]:
    """Return the scores of some prompts, [N], and how each head changes them, [heads, N]."""
    count = len(inputs["input_ids"])
    replay = Replay(root, _last_only(root, inputs))
    plain = scored(score, replay.logits[:, -1], count)
    asked = {
        "search": "act", "model": type(root).__name__, "ids": inputs["input_ids"].tolist(),
        "options": [tried.alpha, tried.threshold, tried.beta, tried.min_rows],
    }  # fmt: skip
    each = torch.zeros(len(names), count)
    sinks = sink_map(root, inputs, tried.alpha, threshold=tried.threshold, min_rows=tried.min_rows)
    acting = sinks.heads.any(0)
    with Resumable(save, asked, plain) as kept:
        for row, name in enumerate(names):
            if not acting[sinks.sites.index(name[0]), name[1]]:
                advance(1)
                continue
            found = kept.get(str(name))
            if found is None:
                logits = replay.run(name[0], replace(tried, heads=[name]))
                found = scored(score, logits[:, -1], count) - plain
                kept.put(str(name), found)
            each[row] = found
            advance(1)
    return plain, each


def _last_only(root: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    if "logits_to_keep" in inspect.signature(root.forward).parameters:
        return {**inputs, "logits_to_keep": 1}
    return dict(inputs)
