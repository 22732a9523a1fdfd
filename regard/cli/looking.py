"""The work behind `regard inspect`: load, encode, run under the lenses, with a progress bar."""

from __future__ import annotations

import inspect as signatures
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.errors import NothingObserved, RegardError, UnsupportedModel
from regard.lens import LENSES, find_lens
from regard.runtime.anatomy import Anatomy, anatomy_of, require_attention, root_of
from regard.runtime.protocol import Lens
from regard.runtime.verbs import watch
from regard.weights import DEFAULT, load

PROBE_LENGTH, PROBE_SEED = 50, 0
PROBE_LENSES = ("induction", "previous-token", "duplicate-token")
NOT_BY_DEFAULT = ("patterns", "column-mass")


def chosen_lenses(names: list[str] | None) -> dict[str, Lens]:
    """Return the lenses named, or all that print a finding.

    Raises:
        RegardError: for a name that is none; the message names the nearest.
    """
    if names is None:
        names = [name for name in LENSES if name not in NOT_BY_DEFAULT]
    return {name: find_lens(name)(name=name) for name in names}


class _Progress(Lens):
    """Moves a progress bar on by one a call."""

    def end_call(self, call: Any) -> None:
        self.step()  # type: ignore[attr-defined]


@dataclass
class Look:
    """A model and a text, ready to be looked at."""

    model: Any
    tokenizer: Any
    anatomy: Anatomy
    name: str
    origin: str
    ids: Tensor

    @classmethod
    def of(cls, source: str | None, text: str, origin: str, dtype: str | None, device: str | None) -> Look:
        """Load a model and encode a text.

        Raises:
            RegardError: where either cannot be done, or the text is too long or too short for the model.
        """
        model, tokenizer = load(source, dtype=dtype, device=device)
        root = root_of(model)
        anatomy = anatomy_of(root)
        require_attention(anatomy)
        name = DEFAULT if source is None else str(source)
        if anatomy.main == "vision" or tokenizer is None:
            raise UnsupportedModel(
                f"{name} is a {type(root).__name__} without a tokenizer, and inspect reads text; "
                "watch it in Python."
            )
        if getattr(root.config, "is_encoder_decoder", False):
            raise UnsupportedModel(
                f"{name} is an encoder-decoder, and inspect reads one text; watch it in Python with both."
            )
        ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
        _check_length(ids.shape[1], root.config, name)
        return cls(root, tokenizer, anatomy, name, origin, ids.to(root.device))

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]

    @property
    def size(self) -> str:
        sites = [s for s in self.anatomy.sites if s.kind == self.anatomy.main]
        heads = sum(site.heads or 0 for site in sites)
        return f"{len(sites)} layers, {heads} heads in all ({type(self.model).__name__})"

    @property
    def probe_words(self) -> str:
        return f"{PROBE_LENGTH} random tokens, twice in a row (seed {PROBE_SEED})"

    def at_text(self, lenses: dict[str, Lens], layers: list[int] | None) -> dict[str, Any]:
        """Return the results of all lenses on the text."""
        return self._run(self.ids, lenses, layers, f"Reading {self.tokens} tokens")

    def at_probe(self, lenses: dict[str, Lens], layers: list[int] | None) -> dict[str, Any]:
        """Return those of the lenses that ask for repetition, on random tokens repeated once.

        The control that natural text lacks: nothing but repetition can tell what comes next.
        """
        chosen = {name: lens for name, lens in lenses.items() if name in PROBE_LENSES}
        if not chosen:
            return {}
        generator = torch.Generator().manual_seed(PROBE_SEED)
        size = self.model.get_input_embeddings().weight.shape[0]
        length = min(PROBE_LENGTH, _longest(self.model.config, 2 * PROBE_LENGTH) // 2)
        half = torch.randint(0, min(size, len(self.tokenizer)), (1, length), generator=generator)
        return self._run(torch.cat([half, half], 1).to(self.ids.device), chosen, layers, "Reading the probe")

    def _run(
        self, ids: Tensor, lenses: dict[str, Lens], layers: list[int] | None, title: str
    ) -> dict[str, Any]:
        from rich.console import Console
        from rich.progress import Progress

        options: dict[str, Any] = {}
        parameters = signatures.signature(self.model.forward).parameters
        if "logits_to_keep" in parameters:
            options["logits_to_keep"] = 1
        if "use_cache" in parameters:
            options["use_cache"] = False
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(title, total=len(self.anatomy.sites))
            bar = _Progress(name="progress")
            object.__setattr__(bar, "step", lambda: progress.advance(task))
            with (
                torch.no_grad(),
                watch(self.model, *lenses.values(), layers=layers) as seen,
                watch(self.model, bar),
            ):
                self.model(input_ids=ids, **options)
        found = {}
        for name in lenses:
            try:
                found[name] = seen[name]
            except NothingObserved:
                continue
        if not found:
            raise NothingObserved(f"None of the lenses {', '.join(lenses)} applies to {self.name}.")
        return found


def _longest(config: Any, otherwise: int) -> int:
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    return otherwise


def _check_length(length: int, config: Any, name: str) -> None:
    longest = _longest(config, length)
    if length > longest:
        raise RegardError(f"The text has {length} tokens, and {name} takes at most {longest}.")
    if length < 2:
        raise RegardError(f"The text has {length} token; give at least two.")
