"""What it costs on each kind of text to put a head out: whether it is at work there, or dormant.

    rise_h = loss with head h silenced - loss as it is            mean next-token loss in nats

A head is *active* on a domain where sending it to the sink raises the loss there, *dormant* where that
changes nothing.

Source: Guo et al., 2024, arXiv 2410.13835, section 2 and `LLM/intervene_each_head.py`. Status: agrees with
the official code, which writes all heads to one file; here each has its row.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.edit.dormant.gate import HeadName, silence
from regard.errors import RegardError
from regard.lens.extremes.measure import check_fits
from regard.lens.extremes.pieces import LENGTH, Texts, cut
from regard.runtime.anatomy import anatomy_of, require_attention, root_of
from regard.runtime.head_table import HeadTable
from regard.runtime.progress import bar
from regard.runtime.verbs import steer

ROWS = 16


def forced_losses(
    model: nn.Module,
    tokenizer: Any,
    texts_a: Texts,
    texts_b: Texts,
    heads: Sequence[HeadName],
    *,
    mode: Literal["zero", "sink"] = "sink",
    length: int | None = LENGTH,
    most: int | None = None,
    progress: bool = True,
) -> HeadTable:
    """Silence heads one at a time, and return how the loss rises on two domains of text.

    Args:
        model, tokenizer, texts_a, texts_b, length, most: as for `regard.lens.compare_sinks`.
        heads: `(layer, head)` pairs, each once.
        mode: `sink`, all of its attention on the first token, or `zero`.
        progress: whether a bar is shown, where stderr is a terminal.

    Returns:
        One row a head: `a` and `b`, the rise of the loss in nats; `about["loss"]` is that of both before.

    Raises:
        RegardError: for no head, another mode, or texts of fewer than 2 tokens.
        NoSuchSite: for a head that is not there.
    """
    model = root_of(model)
    anatomy = anatomy_of(model)
    require_attention(anatomy)
    if mode not in ("zero", "sink") or not list(heads):
        raise RegardError(
            f"mode is {mode!r}, of {len(heads)} heads; it must be zero or sink, of one or more."
        )
    named = [(anatomy.check_head(*head).alias, head[1]) for head in heads]
    domains = [cut(texts, tokenizer, length, most) for texts in (texts_a, texts_b)]
    for pieces in domains:
        check_fits(model, pieces)
    with bar("Silencing heads", 2 * (1 + len(named)), progress) as tick:
        plain = [_loss(model, pieces, None, mode, tick) for pieces in domains]
        rises = [[_loss(model, p, head, mode, tick) - was for p, was in zip(domains, plain, strict=True)]
                 for head in named]  # fmt: skip
    about = {
        "main": anatomy.main, "lens": "forced-losses", "source": "Guo et al. 2024, arXiv 2410.13835",
        "definition": f"rise of the loss in nats, head by head, mode {mode}", "loss": plain,
        "pieces": [len(pieces) for pieces in domains],
    }  # fmt: skip
    columns = {name: [row[i] for row in rises] for i, name in enumerate(("a", "b"))}
    return HeadTable(tuple(site for site, _ in named), [h for _, h in named], columns, about)  # type: ignore[arg-type]


def _loss(model: nn.Module, pieces: Sequence[Tensor], head: HeadName | None, mode: Any, tick: Any) -> float:
    steered: Any = nullcontext() if head is None else steer(model, silence([head], mode))
    alike: dict[int, list[Tensor]] = {}
    for ids in pieces:
        alike.setdefault(len(ids), []).append(ids)
    total, count = 0.0, 0
    with torch.no_grad(), steered:
        for rows in alike.values():
            for ids in torch.stack(rows).to(next(model.parameters()).device).split(ROWS):
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
                each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
                total, count = total + float(each), count + ids[:, 1:].numel()
    tick(1)
    return total / count
