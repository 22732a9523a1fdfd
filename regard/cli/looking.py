"""The work behind `regard inspect`: load, encode, run under the lenses, with a progress bar."""

from __future__ import annotations

import inspect as signatures
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.cli.given import check_depth, check_layers
from regard.errors import NothingObserved, RegardError, UnsupportedModel
from regard.lens import LENSES, find_lens
from regard.runtime.anatomy import Anatomy, anatomy_of, require_attention, root_of
from regard.runtime.protocol import Lens
from regard.runtime.verbs import watch
from regard.weights import Source
from regard.weights.quiet import busy
from regard.weights.source import check_device, check_dtype, first_sentence

PROBE_LENGTH, PROBE_SEED = 50, 0
PROBE_LENSES = ("induction", "previous-token", "duplicate-token")
NOT_BY_DEFAULT = ("patterns", "column-mass")


def chosen_lenses(names: Sequence[str] | None) -> dict[str, Lens]:
    """Return the lenses named, each once, or all that print a finding.

    Raises:
        RegardError: for a name that is none; the message names the nearest.
    """
    if names is None:
        names = [name for name in LENSES if name not in NOT_BY_DEFAULT]
    return {name: find_lens(name)(name=name) for name in names}


class _Step(Lens):
    """Calls a function after every attention call."""

    def __init__(self, step: Callable[[], None]) -> None:
        super().__init__(name="step")
        object.__setattr__(self, "step", step)

    def end_call(self, call: Any) -> None:
        self.step()  # type: ignore[attr-defined]


@dataclass
class Look:
    """A model and a text, ready to be looked at.

    Attributes:
        name: the model, as the user named it.
        origin: where the text came from, in words.
        ids: the text's tokens, int64 [1, T].
    """

    model: Any
    tokenizer: Any
    anatomy: Anatomy
    name: str
    origin: str
    ids: Tensor

    @classmethod
    def of(
        cls,
        source: str | None,
        text: str,
        origin: str,
        layers: list[int] | None = None,
        dtype: str | None = None,
        device: str | None = None,
    ) -> Look:
        """Load a model and encode a text; what can be refused before weights are read is.

        Raises:
            RegardError: where either cannot be done, the text is too long or too short for the model, or
                the model has no such layer.
        """
        check_dtype(dtype)
        check_device(device)
        found = Source.find(source)
        _check_reads_text(found)
        with busy("Reading the text"):
            ids = found.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"].long()
        _check_length(ids.shape[1], _longest(found.config), found.name)
        check_depth(layers, found.config)
        with busy(f"Loading {found.name}"):
            root = root_of(found.read(dtype, device))
        anatomy = anatomy_of(root)
        require_attention(anatomy)
        check_layers(layers, anatomy)
        _check_tokens(ids, root, found.name)
        return cls(root, found.tokenizer, anatomy, found.name, origin, ids.to(root.device))

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]

    @property
    def size(self) -> str:
        """The model in words: layers, heads, class, and how much of its attention is out of reach."""
        sites = [s for s in self.anatomy.sites if s.kind == self.anatomy.main]
        heads = sum(site.heads or 0 for site in sites)
        layers = "1 layer" if len(sites) == 1 else f"{len(sites)} layers"
        beyond = len(self.anatomy.unreachable)
        hidden = f"; {beyond} attention modules are out of reach" if beyond else ""
        return f"{layers}, {heads} heads in all ({type(self.model).__name__}){hidden}"

    @property
    def probe_length(self) -> int:
        longest = _longest(self.model.config)
        return PROBE_LENGTH if longest is None else min(PROBE_LENGTH, longest // 2)

    @property
    def probe_words(self) -> str:
        return f"{self.probe_length} random tokens, twice in a row (seed {PROBE_SEED})"

    def at_text(self, lenses: dict[str, Lens], layers: list[int] | None, all_of: bool) -> dict[str, Any]:
        """Return the results of the lenses on the text.

        Args:
            lenses: by name.
            layers: numbers in the main stack; None for all.
            all_of: whether every lens must have something to say; others are left out.

        Raises:
            NothingObserved: where a lens that must has not.
        """
        return self._run(self.ids, lenses, layers, f"Reading {self.tokens} tokens", all_of)

    def at_probe(self, lenses: dict[str, Lens], layers: list[int] | None) -> dict[str, Any]:
        """Return those of the lenses that ask for repetition, on random tokens repeated once.

        The control that natural text lacks: nothing but repetition can tell what comes next.
        """
        chosen = {name: lens for name, lens in lenses.items() if name in PROBE_LENSES}
        if not chosen or self.probe_length < 2:
            return {}
        generator = torch.Generator().manual_seed(PROBE_SEED)
        size = min(self.model.get_input_embeddings().weight.shape[0], len(self.tokenizer))
        half = torch.randint(0, size, (1, self.probe_length), generator=generator)
        ids = torch.cat([half, half], 1).to(self.ids.device)
        return self._run(ids, chosen, layers, "Reading the probe", False)

    def _run(
        self, ids: Tensor, lenses: dict[str, Lens], layers: list[int] | None, title: str, all_of: bool
    ) -> dict[str, Any]:
        options: dict[str, Any] = {}
        parameters = signatures.signature(self.model.forward).parameters
        if "logits_to_keep" in parameters:
            options["logits_to_keep"] = 1
        if "use_cache" in parameters:
            options["use_cache"] = False
        seen = watch(self.model, *lenses.values(), layers=layers)
        with torch.no_grad(), seen, _stepping(self.model, title, len(self.anatomy.sites)):
            self._forward(ids, options)
        found = {}
        for name in lenses:
            try:
                found[name] = seen[name]
            except NothingObserved as nothing:
                if all_of:
                    raise NothingObserved(
                        f"--lens {name} has nothing to say of {self.name}: {nothing}"
                    ) from nothing
        if not found:
            raise NothingObserved(f"None of the lenses {', '.join(lenses)} applies to {self.name}.")
        return found

    def _forward(self, ids: Tensor, options: dict[str, Any]) -> None:
        try:
            self.model(input_ids=ids, **options)
        except RegardError:
            raise
        except torch.OutOfMemoryError as error:
            raise RegardError(
                f"{self.name} ran out of memory on {ids.shape[1]} tokens; give a shorter text."
            ) from error
        except (TypeError, ValueError) as error:
            raise UnsupportedModel(
                f"{self.name} ({type(self.model).__name__}) does not run on text alone "
                f"({first_sentence(error)}); watch it in Python."
            ) from error


@contextmanager
def _stepping(model: Any, title: str, total: int) -> Iterator[None]:
    """A bar on a terminal that moves on with every attention call of `model`."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(title, total=total)
        with watch(model, _Step(lambda: progress.advance(task))):
            yield


def _check_reads_text(found: Source) -> None:
    """Refuse a model that one text does not feed, by its config and tokenizer."""
    name = found.name
    if getattr(found.config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{name} is an encoder-decoder, and inspect reads one text; watch it in Python with both."
        )
    if found.tokenizer is None:
        kind = (found.config.architectures or [type(found.config).__name__])[0]
        raise UnsupportedModel(
            f"{name} ({kind}) comes without a tokenizer, and inspect reads text; watch it in Python."
        )


def _longest(config: Any) -> int | None:
    """How many tokens a model takes, where its config says."""
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        if isinstance(value := getattr(config.get_text_config(), name, None), int):
            return value
    return None


def _check_length(length: int, longest: int | None, name: str) -> None:
    if longest is not None and length > longest:
        raise RegardError(f"The text has {length} tokens, and {name} takes at most {longest}.")
    if length < 2:
        raise RegardError(f"The text has {length} token{'s' * (length != 1)}; give at least two.")


def _check_tokens(ids: Tensor, model: Any, name: str) -> None:
    """Refuse a tokenizer that is another model's, and texts beyond a table of positions."""
    known = model.get_input_embeddings().weight.shape[0]
    if int(ids.max()) >= known:
        raise RegardError(
            f"The tokenizer of {name} gives token {int(ids.max())}, and the model knows {known}: the two do "
            "not belong together."
        )
    for part, module in model.named_modules():
        if "position" in part and isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            _check_length(ids.shape[1], module.num_embeddings - module.padding_idx - 1, name)
