"""The runs of path patching: senders of a layer side by side, with a run of the layers between or without."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from regard.runtime.path_closed import Streams, require_sum
from regard.runtime.path_stages import Enough, FrozenParts, GivenInputs, Held, KeptInputs, Received, Sender
from regard.runtime.prefix import prefix_cache
from regard.runtime.replay import Replay
from regard.runtime.resumable import Resumable
from regard.runtime.sides import Scored, after_prefix, scored
from regard.runtime.site import Site

FEW = 192


class Patcher:
    """Runs the senders, by layer, and scores them."""

    def __init__(
        self, root: nn.Module, sites: list[Site], ids: Tensor, at: int, held: Held,
        received: Received | None, freeze_mlps: bool, metric: Scored, clean: Tensor, rows: int, output: Any,
    ) -> None:  # fmt: skip
        self.root, self.sites, self.held, self.received, self.clean = root, sites, held, received, clean
        self.freeze_mlps, self.metric = freeze_mlps, metric
        self.streams: Streams | None = None
        self.tokens: Tensor | None = None
        self.many = max(1, rows // len(ids))
        self.few = min(self.many, FEW // len(ids))
        prefix = prefix_cache(root, output, at)
        self.one = Replay(root, after_prefix(root, ids[:, at : at + 1], prefix))
        self.rest = None if received is None else Replay(root, after_prefix(root, ids[:, at:], prefix))
        self.numbers = {site.alias: n for n, site in enumerate(sites)}
        found = sorted(map(self.numbers.__getitem__, received.heads)) if received else [len(sites)]
        self.first, self.last = found[0], found[-1]

    def close(self, streams: Streams, tokens: Tensor | None) -> None:
        """Take the closed form from now on, having tried it on the head of the first layer that adds most."""
        alias = self.sites[0].alias
        heads: list[Sender] = [(alias, head) for head in range(self.held.heads(alias))]
        one = [max(heads, key=lambda sender: float(streams.added(sender).norm()))]
        if self.received is None:
            closed = streams.logits(one, tokens)
            ran, before = self._frozen(one)[:, -1], self.one.logits[:, -1]
            require_sum(self.root, before, torch.where(closed.isnan(), closed, ran), closed)
        elif self.first > 0:
            given = self._kept(one)
            clean = self._inputs(self.sites[self.first].alias, [])
            self.streams = streams
            for name, summed in self._kept(one).items():
                if self.numbers[name] == self.first:
                    require_sum(self.root, clean[name], given[name], summed)
        self.streams, self.tokens = streams, tokens

    def changes(self, senders: list[Sender], kept: Resumable, advance: Callable[[int], None]) -> Tensor:
        """Return the change of the metric, [senders, N]; NaN where no receiver comes after."""
        found = torch.full((len(senders), len(self.clean)), torch.nan)
        missing = []
        for i, sender in enumerate(senders):
            known = kept.get(str(sender))
            if known is not None:
                found[i] = known
            elif self.numbers[sender[0]] < self.last:
                missing.append(i)
        advance(len(senders) - len(missing))
        for members in self._batches(senders, missing):
            scores = self._run([senders[i] for i in members])
            found[members] = scores.view(len(members), -1) - self.clean
            for i in members:
                kept.put(str(senders[i]), found[i])
            advance(len(members))
        return found

    def _batches(self, senders: list[Sender], missing: list[int]) -> Iterable[list[int]]:
        """Yield senders that share a run: those of a layer, and where these are few those of the next."""
        groups: dict[int, list[int]] = {}
        for i in missing:
            groups.setdefault(self._group(senders[i]), []).append(i)
        batch: list[int] = []
        for _, members in sorted(groups.items()):
            if batch and (self.streams is not None or len(batch) + len(members) > self.few):
                yield batch
                batch = []
            for start in range(0, len(members), self.many):
                batch += members[start : start + self.many]
                if len(batch) >= self.many:
                    yield batch
                    batch = []
        if batch:
            yield batch

    def _group(self, sender: Sender) -> int:
        """The layer of a sender; in closed form, how many layers of receivers do not come after it."""
        number = self.numbers[sender[0]]
        if self.streams is None:
            return number
        return sum(self.numbers[alias] <= number for alias in self.received.heads) if self.received else 0

    def _run(self, senders: list[Sender]) -> Tensor:
        if self.received is None or self.rest is None:
            if self.streams is not None:
                return self._scores(self.streams.logits(senders, self.tokens), len(senders))
            return self._scores(self._frozen(senders)[:, -1], len(senders))
        given = GivenInputs(self.received, self._kept(senders))
        logits = self.rest.run(self.sites[self.first].alias, given, batch=len(senders))
        return self._scores(logits[:, -1], len(senders))

    def _frozen(self, senders: list[Sender], more: Sequence[KeptInputs] = ()) -> Tensor:
        """Step 1: run with everything held but the senders, and return the logits."""
        first = self.numbers[senders[0][0]]
        layers = frozenset(site.alias for site in self.sites[first:])
        frozen = FrozenParts(self.held, layers, senders, self.freeze_mlps)
        return self.one.run(self.sites[first].alias, [frozen, *more], batch=len(senders))

    def _kept(self, senders: list[Sender]) -> dict[str, Tensor]:
        """Return what the receivers compute in step 1, by layer."""
        assert self.received is not None
        if self.streams is not None:
            above = [a for a in self.received.heads if self.numbers[a] > self.numbers[senders[0][0]]]
            found: dict[str, Tensor] = {}
            for alias in above:
                found |= self._inputs(alias, senders)
            return found
        lens = KeptInputs(self.received, self.sites[self.last].alias)
        with suppress(Enough):
            self._frozen(senders, [lens])
        assert self.one.session is not None
        return dict(self.one.session[KeptInputs])

    def _inputs(self, alias: str, senders: list[Sender]) -> dict[str, Tensor]:
        """Return what the receivers of one layer compute, with the senders added to the clean stream."""
        assert self.received is not None
        lens = KeptInputs(Received({alias: self.received.heads[alias]}, self.received.component), alias)
        edits = [self.streams.given(alias, senders)] if self.streams is not None and senders else []
        with suppress(Enough):
            self.one.run(alias, [*edits, lens], batch=max(1, len(senders)))
        assert self.one.session is not None
        return dict(self.one.session[KeptInputs])

    def _scores(self, logits: Tensor, count: int) -> Tensor:
        parts = logits.chunk(count)
        return torch.cat([scored(self.metric, part, len(self.clean)) for part in parts])
