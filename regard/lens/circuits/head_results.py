"""What every head writes into the residual stream on two kinds of prompts, one vector a head and prompt.

    r_eh = W_O,h mean_t z_eht          mean over the real positions of prompt e, or its last one alone

with z the head outputs before the output projection, whose bias belongs to no head. The mean is taken before
the projection, which is linear, so that nothing of the size [T, H, D] is made.

Source: O'Neill and Bui, 2024, arXiv 2405.12522, section 3. Status: agrees with the official code where
prompts are of one length; prompts of several lengths are masked here, which it does not do.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regard.errors import RegardError, UnsupportedModel
from regard.runtime.anatomy import anatomy_of, require_attention, root_of
from regard.runtime.call import Call
from regard.runtime.head_table import Head
from regard.runtime.progress import bar
from regard.runtime.protocol import Lens, Wanted
from regard.runtime.session import Session

POOLS = ("mean", "last")
TOKENS = 1024
Given = Sequence[str] | Sequence[Tensor] | Tensor


@dataclass(frozen=True, eq=False)
class HeadResults:
    """Vectors of two kinds of prompts, the positive ones first.

    Attributes:
        vectors: float32 [N, heads, D].
        positive: bool [N].
        names: (alias of the layer, head) of each.

    Raises:
        RegardError: for fewer than two prompts of a kind, other numbers of the two, or both kinds the same.
    """

    vectors: Tensor
    positive: Tensor
    names: tuple[Head, ...]

    def __post_init__(self) -> None:
        counts = int(self.positive.sum()), int((~self.positive).sum())
        check_counts(*counts)
        if torch.equal(self.vectors[self.positive], self.vectors[~self.positive]):
            raise RegardError("positive and negative prompts are the same, so no head can tell them apart.")

    @property
    def layers(self) -> tuple[str, ...]:
        """The alias of the layer of each head."""
        return tuple(site for site, _ in self.names)


def check_counts(positives: int, negatives: int) -> None:
    """Refuse too few prompts, or more of one kind than of the other.

    Raises:
        RegardError: saying how many there are.
    """
    if min(positives, negatives) < 2:
        raise RegardError(f"there are {positives} positive and {negatives} negative prompts; give 2 of each.")
    if positives != negatives:
        raise RegardError(
            f"there are {positives} positive and {negatives} negative prompts; how many codes are seen "
            "depends on how many prompts there are, so give as many of each."
        )


def head_results(
    model: nn.Module,
    positives: Given,
    negatives: Given,
    *,
    tokenizer: Any = None,
    pool: str = "mean",
    skip_first: bool = False,
    progress: bool = True,
) -> HeadResults:
    """Run a model over two kinds of prompts, and keep one vector a head and prompt.

    Args:
        model: a causal language model in evaluation mode.
        positives, negatives: texts, or token ids: int64 [T] each, T may differ; or [N, T].
        tokenizer: of transformers; needed for texts.
        pool: `mean` over the positions of a prompt, or its `last`.
        skip_first: leave the first position out of the mean; sinks there write vectors of huge norm.
        progress: whether a bar is shown, where stderr is a terminal.

    Raises:
        RegardError: for another `pool`, too few prompts, other numbers of the two kinds, the same prompts
            twice, or texts without a tokenizer.
        UnsupportedModel: where the output projection cannot be read.
    """
    if pool not in POOLS:
        raise RegardError(f"pool is {pool!r}; it must be one of {', '.join(POOLS)}.")
    sides = [_tokens(given, tokenizer) for given in (positives, negatives)]
    check_counts(len(sides[0]), len(sides[1]))
    if all(torch.equal(a, b) for a, b in zip(*sides, strict=True)):
        raise RegardError("positives and negatives are the same prompts, so no head can tell them apart.")
    shortest = min(len(ids) for side in sides for ids in side)
    if shortest < 1 + skip_first:
        raise RegardError(f"a prompt has {shortest} tokens, of which none is left to look at.")
    root = root_of(model)
    anatomy = anatomy_of(root)
    require_attention(anatomy)
    sites = [site for site in anatomy.sites if site.kind == anatomy.main]
    outputs = _pooled(root, anatomy.main, sides[0] + sides[1], pool, skip_first, progress)
    vectors, names = [], []
    for site in sites:
        weight = anatomy.output_weight(site, outputs[site.alias].shape[1]).detach().float()  # [D, H, Dv]
        if weight.shape[2] != outputs[site.alias].shape[2]:
            raise UnsupportedModel(f"the output projection of {site.alias} takes no heads as they are.")
        vectors.append(torch.einsum("nhv,dhv->nhd", outputs[site.alias].to(weight.device), weight))
        names += [(site.alias, head) for head in range(weight.shape[1])]
    positive = torch.arange(len(sides[0]) + len(sides[1])) < len(sides[0])
    return HeadResults(torch.cat(vectors, 1), positive, tuple(names))


@dataclass(frozen=True, eq=False, kw_only=True)
class PooledOutputs(Lens):
    """Keeps the mean head output of each sequence, or that of its last position; float32 [B, H, Dv]."""

    kind: str
    pool: str = "mean"
    skip_first: bool = False
    found: dict[str, Tensor] = field(default_factory=dict, init=False)

    def fresh(self) -> Lens:
        twin = super().fresh()
        object.__setattr__(twin, "found", {})
        return twin

    def wants(self, call: Call) -> Wanted | None:
        return Wanted() if call.site.kind == self.kind else None

    def head_outputs(self, call: Call) -> None:
        assert call.head_outputs is not None
        x = call.head_outputs.float()
        valid = call.valid_queries
        kept = torch.ones(x.shape[0], x.shape[2], dtype=torch.bool, device=x.device)
        kept = kept if valid is None else kept & valid
        order = kept.cumsum(1)
        if self.pool == "last":
            kept = kept & (order == order[:, -1:])
        elif self.skip_first:
            kept = kept & (order > 1)
        share = kept.float() / kept.sum(1, keepdim=True)
        self.found[call.site.alias] = torch.einsum("bhtv,bt->bhv", x, share).detach()

    def result(self) -> dict[str, Tensor]:
        return dict(self.found)


def _pooled(
    root: nn.Module, kind: str, prompts: list[Tensor], pool: str, skip_first: bool, progress: bool
) -> dict[str, Tensor]:
    device = next(root.parameters()).device
    known = inspect.signature(root.forward).parameters
    options = {
        name: value for name, value in {"use_cache": False, "logits_to_keep": 1}.items() if name in known
    }
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    parts: dict[str, list[Tensor]] = {}
    with bar("Reading prompts", len(prompts), progress) as advance:
        for members in _batches(order, prompts):
            ids, mask = _padded([prompts[i] for i in members])
            lens = PooledOutputs(kind=kind, pool=pool, skip_first=skip_first)
            with torch.no_grad(), Session(root, [lens]) as session:
                root(input_ids=ids.to(device), attention_mask=mask.to(device), **options)
            for alias, x in session[PooledOutputs].items():
                parts.setdefault(alias, []).append(x)
            advance(len(members))
    back = torch.tensor(order).argsort()
    return {alias: torch.cat(found)[back.to(found[0].device)] for alias, found in parts.items()}


def _batches(order: list[int], prompts: list[Tensor]) -> list[list[int]]:
    """Prompts of like length together, about `TOKENS` tokens a batch."""
    found: list[list[int]] = []
    for i in order:
        if not found or (len(found[-1]) + 1) * len(prompts[i]) > TOKENS:
            found.append([])
        found[-1].append(i)
    return found


def _padded(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(ids) for ids in prompts])
    ids = nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def _tokens(given: Given, tokenizer: Any) -> list[Tensor]:
    found = []
    for each in given:
        if isinstance(each, str):
            if tokenizer is None:
                raise RegardError("prompts are texts; give the tokenizer too.")
            each = tokenizer(each, return_tensors="pt")["input_ids"][0]
        if not isinstance(each, Tensor) or each.ndim != 1 or each.is_floating_point():
            raise RegardError("a prompt must be a text, or token ids [T].")
        found.append(each.long())
    return found
