"""Batches of texts with a label and texts without, of similar length, in an order that seed and epoch decide.

An epoch goes through the texts with a label once; those without take turns, however many there are. Rows
without a label have -100 in its place, which cross-entropy leaves out.

Source: the batches of Kitada and Iyatomi, 2021, arXiv 2104.08763. Status: our choice (grouping by length).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from regard.errors import RegardError
from regard.objectives.schedule import check_count, mixed

UNLABELLED = -100
WINDOW = 8
Row = dict[str, Any]


class MixedBatches(Sampler[list[int]]):
    """Numbers of the rows of each batch: those with a label come first, in all and in each batch.

    Args:
        lengths: tokens of each row.
        labelled: how many of the rows, from the first, have a label.
        batch: rows with a label in a batch; the last of an epoch may have fewer.
        ratio: rows without a label for each with one; where there is none of them it does not count.
        seed: of the order.

    Attributes:
        epoch: whose batches are given; `set_epoch` changes it.
    """

    def __init__(
        self, lengths: Sequence[int], labelled: int, batch: int, ratio: float = 1.0, seed: int = 0
    ) -> None:
        check_count("batch", batch, 1)
        if not labelled:
            raise RegardError("there is no text with a label.")
        if not 0 <= ratio < math.inf:
            raise RegardError(f"ratio is {ratio}; it must be a finite number from 0.")
        self.lengths, self.labelled, self.seed, self.epoch = lengths, labelled, seed, 0
        self.batch = min(batch, labelled)
        others = len(lengths) - labelled
        self.more = max(1, round(ratio * self.batch)) if others and ratio else 0
        self.of = lru_cache(maxsize=2)(self._of)

    def __len__(self) -> int:
        return -(-self.labelled // self.batch)

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.of(self.epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose whose batches are given."""
        self.epoch = epoch

    def at(self, step: int) -> list[int]:
        """Return the rows of a step, counted from 0 over all epochs."""
        epoch, number = divmod(step, len(self))
        return self.of(epoch)[number]

    def _of(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(mixed(self.seed, epoch))
        known = torch.randperm(self.labelled, generator=generator).tolist()
        others = self._others(epoch)
        batches: list[list[int]] = []
        for start in range(0, len(self), WINDOW):
            count = min(WINDOW, len(self) - start)
            first = self._sorted(known[start * self.batch : (start + count) * self.batch])
            second = self._sorted(others[start * self.more : (start + count) * self.more])
            batches += [
                [*first[i * self.batch : (i + 1) * self.batch], *second[i * self.more : (i + 1) * self.more]]
                for i in range(count)
            ]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def _others(self, epoch: int) -> list[int]:
        """What of the rows without a label an epoch takes: they go round, each time in a new order."""
        count, needed = len(self.lengths) - self.labelled, len(self) * self.more
        found: list[int] = []
        place = epoch * needed
        while len(found) < needed:
            turn, at = divmod(place, count)
            generator = torch.Generator().manual_seed(mixed(self.seed + 1, turn))
            part = torch.randperm(count, generator=generator)[at : at + needed - len(found)]
            found += (part + self.labelled).tolist()
            place += len(part)
        return found

    def _sorted(self, rows: list[int]) -> list[int]:
        return sorted(rows, key=lambda row: self.lengths[row])


class MixedLoader(DataLoader[Row]):
    """A `DataLoader` of batches of `MixedBatches`; the Trainer of transformers takes it as it is.

    Args:
        labelled: rows with `input_ids` and `labels`, a number.
        unlabelled: rows with `input_ids`; a label there is left out, with a notice. Empty: labelled alone.
        ratio: rows without a label for each with one.
        batch: rows with a label in a batch.
        pad: token id that stands for nothing.
        seed: of the order.

    Raises:
        RegardError: where no row has a label, or a number is out of range.

    Example:
        >>> labelled = [{"input_ids": [2, 5, 3], "labels": n % 2} for n in range(6)]
        >>> batch = next(iter(MixedLoader(labelled, [{"input_ids": [2, 7]}] * 9, batch=2)))
        >>> batch["input_ids"].shape, batch["labels"][2:].tolist()
        (torch.Size([4, 3]), [-100, -100])
    """

    def __init__(
        self,
        labelled: Sequence[Mapping[str, Any]],
        unlabelled: Iterable[Mapping[str, Any]] = (),
        ratio: float = 1.0,
        *,
        batch: int = 32,
        pad: int = 0,
        seed: int = 0,
    ) -> None:
        rows: list[Row] = [dict(row) for row in labelled]
        others = [dict(row) for row in unlabelled]
        ignored = sum(row.get("labels", UNLABELLED) != UNLABELLED for row in others)
        if ignored:
            warnings.warn(
                f"{ignored} texts given as unlabelled have labels; they are not used.", stacklevel=2
            )
        lengths = [len(row["input_ids"]) for row in (*rows, *others)]
        batches = MixedBatches(lengths, len(rows), batch, ratio, seed)
        whole = [*rows, *({**row, "labels": UNLABELLED} for row in others)]
        super().__init__(whole, batch_sampler=batches, collate_fn=Padding(pad))  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Choose whose batches are given; the Trainer does so itself."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


class Padding:
    """Makes a batch of rows: `input_ids` and `attention_mask`, int64 [B, T], and `labels` [B].

    Args:
        pad: token id that stands for nothing.
    """

    def __init__(self, pad: int = 0) -> None:
        self.pad = pad

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), longest), self.pad)
        mask = torch.zeros(len(rows), longest, dtype=torch.int64)
        for number, row in enumerate(rows):
            tokens = torch.as_tensor(row["input_ids"])
            ids[number, : len(tokens)] = tokens
            mask[number, : len(tokens)] = 1
        labels = torch.tensor([int(row.get("labels", UNLABELLED)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
