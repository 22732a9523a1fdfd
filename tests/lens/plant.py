"""An edit that makes one head attend where it is told, for lenses to find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import regard
from regard.runtime.protocol import Edit

SITE, HEAD = "text.1", 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Plant(Edit):
    """Head 2 of layer 1 puts all attention of row i on key `target(i)`, or stays as it is for None."""

    target: Callable[[int], int | None]

    def weights(self, block):
        if block.site.alias != SITE:
            return None
        weights = block.weights.clone()
        for row in range(block.start, block.stop):
            key = self.target(row)
            if key is not None:
                weights[:, HEAD, row - block.start] = 0
                weights[:, HEAD, row - block.start, key - block.key_start] = 1
        return weights


def found_and_control(model, ids, lens, target, **options):
    """Return a lens' result where the head was planted, and where it was not."""
    results = []
    for edits in ([Plant(target=target)], []):
        with torch.no_grad(), regard.steer(model, *edits, lens, **options) as seen:
            model(input_ids=ids)
        results.append(seen[type(lens)])
    return results
