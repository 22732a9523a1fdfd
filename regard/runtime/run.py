"""One forward of a model, or one `generate()`: what was fed in, and state that follows the sequences."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch

from regard.errors import RegardError


class Run:
    """One forward or one `generate()`.

    Attributes:
        token_ids: all token ids fed so far, [B, S], or None where the model takes no tokens.
        position_ids: the positions they were fed with, [B, S] or [P, B, S], or None where not always given.
        valid: which of them are real, bool [B, S], or None where none is padding.
        phase: 'prefill' or 'decode'.
        step: 0 in the prefill, n in the n-th decoding step.
        spans: name -> bool [B, S], which positions are what ('image', 'system', ...).
        batch: number of sequences.
        appended: how many tokens `generate()` has appended before this forward; `grows` whether it has.
        role: what the names of its tokens and mask begin with: `decoder_` in an encoder-decoder.
        encoder_ids: what an encoder-decoder's encoder was fed, [B, S], or None.
        kwargs: the keyword arguments of the current forward; `first_kwargs` those of the first, and
            `first_args` what the model takes by position only.
        fed: how many forwards belong to this run so far; `width` is how many tokens the current one is fed.
        seen: how many positions stood in the cache before the current forward, `first_seen` before the first;
            None where that is unknown: there is no cache, or one that does not tell.
        calls: how often each site was called in the current forward, `totals` in all of them.
        memory: what the row blocks of the current forward are computed in.
    """

    def __init__(self) -> None:
        self.token_ids: torch.Tensor | None = None
        self.position_ids: torch.Tensor | None = None
        self.valid: torch.Tensor | None = None
        self.phase = "prefill"
        self.step = 0
        self.spans: dict[str, torch.Tensor] = {}
        self.batch = 0
        self.role = ""
        self.grows = False
        self.appended = 0
        self.kwargs: dict[str, Any] = {}
        self.encoder_ids: torch.Tensor | None = None
        self.first_args: tuple[Any, ...] = ()
        self.first_kwargs: dict[str, Any] = {}
        self.fed = 0
        self.width = 0
        self.seen: int | None = None
        self.first_seen: int | None = None
        self.calls: dict[str, int] = {}
        self.totals: dict[str, int] = {}
        self.memory: dict[Any, torch.Tensor] = {}
        self._states: dict[tuple[int, str, int], dict[str, Any]] = {}
        self._owners: dict[int, Any] = {}

    def state(self, owner: Any, site: Any = None, part: int = 0) -> dict[str, Any]:
        """Return the dict that `owner` keeps for `site` in this run; `part` as in `Call.part`.

        Tensors in it whose first dimension is the batch are reordered with the beams; everything is
        gone with the run.
        """
        self._owners[id(owner)] = owner
        return self._states.setdefault((id(owner), site.alias if site is not None else "", part), {})

    def reorder(self, index: torch.Tensor) -> None:
        """Follow the beams: sequence i continues what was sequence `index[i]`."""
        for state in self._states.values():
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == self.batch:
                    state[key] = value.index_select(0, index.to(value.device))
        for name in ("token_ids", "valid"):
            value = getattr(self, name)
            if value is not None and value.shape[0] == index.shape[0]:
                setattr(self, name, value.index_select(0, index.to(value.device)))
        self.spans = {
            k: v.index_select(0, index.to(v.device)) if v.shape[0] == index.shape[0] else v
            for k, v in self.spans.items()
        }

    def valid_rows(self, length: int) -> torch.Tensor | None:
        """Return which of the last `length` positions fed in are real, bool [B, length], or None."""
        if self.valid is None or self.valid.shape[1] < length:
            return None
        return self.valid[:, self.valid.shape[1] - length :]

    def repeatable(self, parameters: Container[str]) -> dict[str, Any]:
        """Return keyword arguments that feed the model all of this run in one forward, without a cache.

        Args:
            parameters: names that the model's forward takes.

        Raises:
            RegardError: where it began with embeddings and went on with tokens, or after a cache that was
                filled before the session.
        """
        if self.first_seen:
            raise RegardError(
                f"This run began after {self.first_seen} positions in a cache that was filled outside the "
                "session, so it cannot be repeated; run them inside the `with` block too, or keep the heads "
                "that you want with Patterns(heads=[(layer, head), ...])."
            )
        kwargs = {k: v for k, v in self.first_kwargs.items() if v is not None}
        for name in ("past_key_values", "cache_position", "labels", "logits_to_keep"):
            kwargs.pop(name, None)
        if "use_cache" in parameters or "past_key_values" in parameters:
            kwargs["use_cache"] = False
        if self.fed > 1 and self.token_ids is not None:
            if kwargs.get(self.role + "inputs_embeds") is not None:
                raise RegardError(
                    "This run began with embeddings, so it cannot be repeated from its tokens; run one "
                    "forward over all of it."
                )
            mask = self.role + "attention_mask"
            for name in (mask, self.role + "position_ids"):
                kwargs.pop(name, None)
            kwargs[self.role + "input_ids"] = self.token_ids
            if self.position_ids is not None:
                kwargs[self.role + "position_ids"] = self.position_ids
            if self.valid is not None:
                kwargs[mask] = self.valid.long()
        return kwargs
