"""Running sums, means, extremes and lists, kept per site, that merge across runs and processes."""

from __future__ import annotations

from typing import Any

import torch

from regard.errors import ShapeMismatch


class Tally:
    """Accumulate named quantities per site.

    A quantity is a float64 tensor of any fixed shape, on the CPU. `mean` keeps a sum and a count,
    `largest` an elementwise maximum, `append` a list. `sites` are `Site` objects; they are kept by
    alias, in the order first seen.

    Example:
        >>> tally = Tally()
        >>> tally.mean(site, "entropy", values_BHT, where=valid_BT)     # doctest: +SKIP
        >>> tally.get("entropy")                                         # doctest: +SKIP
        {'text.0': tensor([...])}
    """

    def __init__(self) -> None:
        self.aliases: dict[str, Any] = {}
        self._sums: dict[tuple[str, str], torch.Tensor] = {}
        self._counts: dict[tuple[str, str], torch.Tensor] = {}
        self._largest: dict[tuple[str, str], torch.Tensor] = {}
        self._lists: dict[tuple[str, str], list[Any]] = {}

    def _note(self, site: Any) -> str:
        self.aliases.setdefault(site.alias, (site.kind, site.layer, site.name))
        return site.alias

    def mean(self, site: Any, name: str, total: torch.Tensor, count: torch.Tensor | float) -> None:
        """Add a sum and the count it was taken over; both broadcast against what is there."""
        key = (self._note(site), name)
        total = total.detach().to("cpu", torch.float64)
        count = torch.as_tensor(count, dtype=torch.float64, device="cpu")
        if key in self._sums:
            _same_shape(self._sums[key], total, name)
            self._sums[key] = self._sums[key] + total
            self._counts[key] = self._counts[key] + count
        else:
            self._sums[key], self._counts[key] = total, count

    def largest(self, site: Any, name: str, value: torch.Tensor) -> None:
        """Keep the elementwise maximum of everything given."""
        key = (self._note(site), name)
        value = value.detach().to("cpu", torch.float64)
        old = self._largest.get(key)
        self._largest[key] = value if old is None else torch.maximum(old, value)

    def append(self, site: Any, name: str, value: Any) -> None:
        """Append to the list kept for this site."""
        self._lists.setdefault((self._note(site), name), []).append(value)

    def get(self, name: str) -> dict[str, Any]:
        """Return, per alias, the mean (0/0 is NaN), the maximum or the list kept under `name`."""
        found: dict[str, Any] = {}
        for alias in self.aliases:
            key = (alias, name)
            if key in self._sums:
                found[alias] = self._sums[key] / self._counts[key]
            elif key in self._largest:
                found[alias] = self._largest[key]
            elif key in self._lists:
                found[alias] = self._lists[key]
        return found

    def count(self, name: str) -> dict[str, torch.Tensor]:
        """Return, per alias, over how many a mean was taken."""
        return {a: self._counts[a, name] for a in self.aliases if (a, name) in self._counts}

    def merge(self, other: Tally) -> None:
        """Add everything that `other` has seen."""
        for alias, about in other.aliases.items():
            self.aliases.setdefault(alias, about)
        for key, total in other._sums.items():
            if key in self._sums:
                _same_shape(self._sums[key], total, key[1])
                self._sums[key] = self._sums[key] + total
                self._counts[key] = self._counts[key] + other._counts[key]
            else:
                self._sums[key], self._counts[key] = total.clone(), other._counts[key].clone()
        for key, value in other._largest.items():
            old = self._largest.get(key)
            self._largest[key] = value if old is None else torch.maximum(old, value)
        for key, values in other._lists.items():
            self._lists.setdefault(key, []).extend(values)

    def export(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return all tensors by a flat key, and a JSON-ready listing; `restore` takes both."""
        tensors: dict[str, torch.Tensor] = {}
        for kind, store in self._stores().items():
            for (alias, name), value in store.items():
                items = value if kind == "list" else [value]
                for i, item in enumerate(items):
                    if isinstance(item, torch.Tensor):
                        tensors[f"{kind}|{alias}|{name}|{i}"] = item.detach().cpu()
        plain = {
            f"{alias}|{name}": [None if isinstance(v, torch.Tensor) else v for v in values]
            for (alias, name), values in self._lists.items()
        }
        return tensors, {"aliases": self.aliases, "lists": plain}

    def restore(self, tensors: dict[str, torch.Tensor], listing: dict[str, Any]) -> None:
        """Take back what `export` gave."""
        self.aliases = {alias: tuple(about) for alias, about in listing["aliases"].items()}
        for key, values in listing["lists"].items():
            alias, name = key.split("|", 1)
            self._lists[alias, name] = list(values)
        for key, tensor in tensors.items():
            kind, alias, name, index = key.split("|")
            store = self._stores()[kind]
            if kind == "list":
                store[alias, name][int(index)] = tensor
            else:
                store[alias, name] = tensor

    def _stores(self) -> dict[str, dict[tuple[str, str], Any]]:
        return {"sum": self._sums, "count": self._counts, "max": self._largest, "list": self._lists}

    def __bool__(self) -> bool:
        return bool(self.aliases)


def _same_shape(old: torch.Tensor, new: torch.Tensor, name: str) -> None:
    if old.shape != new.shape:
        raise ShapeMismatch(
            f"{name} had shape {tuple(old.shape)} before and has {tuple(new.shape)} now; "
            "watch inputs of different width in sessions of their own."
        )
