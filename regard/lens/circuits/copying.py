"""Copying scores: does a head write the name that it looks at, or the opposite of it?

    score = share of names with token(name) among the top 5 of  unembed(final_norm(W_O W_V norm_l(x)))
    x: the residual stream at the name, leaving block 0

The map from what a head looks at to the logits, whatever it looks at. A name mover has a score near 1, a
negative mover one near 1 with the sign of W_O W_V turned round, and most heads a low one.

Source: Wang et al., 2023, arXiv 2211.00593, section 3.1 and appendix. Status: paper only; names are the
indirect object and the first mention of the subject.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor, nn

from regard.errors import RegardError
from regard.runtime.anatomy import anatomy_of, require_attention, root_of
from regard.runtime.attribution import ends_of
from regard.runtime.head_table import Head, HeadTable
from regard.runtime.path_closed import GivenStream
from regard.runtime.path_stages import Enough, KeptInputs, Received
from regard.runtime.replay import Replay
from regard.runtime.row_patch import collect
from regard.runtime.site import Point
from regard.tasks.prompts import Prompts

TOP = 5
NAMES = ("IO", "S1")


def copying_scores(
    model: nn.Module, prompts: Prompts, heads: Sequence[Head] | None = None, *, top: int = TOP
) -> HeadTable:
    """Return how often each head would write the name that it looks at.

    Args:
        model: a causal language model in evaluation mode, whose norm and unembedding can be found.
        prompts: of `regard.tasks.ioi`.
        heads: (alias, head) each; default every head, which takes as many unembeddings as there are heads.
        top: among how many tokens the name must be.

    Returns:
        Columns `copying` and `negative`, the same with the sign turned round, shares of names.

    Raises:
        RegardError: for no heads, or a `top` below 1.
        NoSuchSite: for a head that is not there.
        UnsupportedModel: where the norm or unembedding cannot be found.

    Example:
        >>> copying_scores(model, prompts, [("text.23", 0)]).at(23, 0)          # doctest: +SKIP
    """
    root = root_of(model)
    anatomy = anatomy_of(root)
    require_attention(anatomy)
    norm, unembedding = ends_of(anatomy)
    sites = [site for site in anatomy.sites if site.kind == anatomy.main]
    every = [(site.alias, head) for site in sites for head in range(site.heads or 0)]
    chosen = every if heads is None else [(anatomy.check_head(*h).alias, h[1]) for h in heads]
    if not chosen or top < 1:
        raise RegardError(f"{len(chosen)} heads and top={top}; both must be at least 1.")
    names, stream = _names(root, prompts, sites[0].alias)
    replay = Replay(root, {"input_ids": names[:, None]})
    rows = []
    for site in sites:
        wanted = [head for alias, head in chosen if alias == site.alias]
        if not wanted:
            continue
        values = _values(replay, site.alias, list(range(site.heads or 0)), stream)
        weight = anatomy.output_weight(site).detach()
        group = weight.shape[1] // values.shape[1]
        for head in wanted:
            wrote = values[:, head // group] @ weight[:, head].T
            with torch.no_grad():
                rows.append([_share(unembedding(norm(sign * wrote)), names, top) for sign in (1, -1)])
    columns = dict(zip(("copying", "negative"), np.array(rows).T, strict=True))
    order = sorted(chosen, key=lambda head: [s.alias for s in sites].index(head[0]))
    about = {"main": anatomy.main, "names": len(names), "top": top}
    return HeadTable(tuple(a for a, _ in order), np.array([h for _, h in order]), columns, about)


def _names(root: nn.Module, prompts: Prompts, first: str) -> tuple[Tensor, Tensor]:
    """Return the names [M], and the stream at them as it leaves the first block, [M, D]."""
    names, streams = [], []
    for part in prompts.by_length():
        ids = part.ids()
        found = next(iter(collect(root, {"input_ids": ids}, [Point("residual", first)]).values()))
        for place in NAMES:
            at = part.places(place)[:, None]
            names.append(ids.gather(1, at)[:, 0])
            streams.append(found[torch.arange(len(ids)), at[:, 0]])
    return torch.cat(names), torch.cat(streams)


def _values(replay: Replay, alias: str, heads: list[int], stream: Tensor) -> Tensor:
    """Return the values [M, H_kv, Dv] that a layer makes of a stream [M, D]."""
    lens = KeptInputs(Received({alias: heads}, "value"), alias)
    with suppress(Enough):
        replay.run(alias, [GivenStream(alias, stream[:, None]), lens])
    assert replay.session is not None
    found: Tensor = replay.session[KeptInputs][alias]
    return found


def _share(logits: Tensor, names: Tensor, top: int) -> float:
    return float((logits.topk(top, -1).indices == names[:, None]).any(-1).float().mean())
