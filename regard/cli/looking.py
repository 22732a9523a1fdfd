"""The work behind `regard inspect`: load, encode, run under the lenses, with a progress bar."""

from __future__ import annotations

import inspect as signatures
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.cli import fit
from regard.cli.given import check_depth, check_layers
from regard.errors import NothingObserved, RegardError, UnsupportedModel, first_sentence
from regard.lens import LENSES, Patterns, find_lens
from regard.runtime.anatomy import Anatomy, anatomy_of, require_attention, root_of
from regard.runtime.protocol import Lens
from regard.runtime.verbs import watch
from regard.weights import Source
from regard.weights.device import check_device, check_dtype
from regard.weights.quiet import busy

PROBE_LENGTH, PROBE_SEED = 50, 0
RECORDER = "report"
PROBE_LENSES = ("induction", "previous-token", "duplicate-token")
READS_IMAGES = "image-maps"
NOT_BY_DEFAULT = ("patterns", "column-mass", "outliers", "routed", "sink-logit", READS_IMAGES)
NOT_PER_HEAD = ("patterns", "residual-norm", "outliers")


def chosen_lenses(
    names: Sequence[str] | None, heads: Sequence[tuple[int, int]] | None = None
) -> dict[str, Lens]:
    """Return the lenses named, each once, or all that print a finding.

    Args:
        heads: (layer, head) pairs whose patterns to keep; default all.

    Raises:
        RegardError: for a name that is none; the message names the nearest. For heads without patterns, and
            for the lens that reads images.
    """
    if names is None:
        names = [name for name in LENSES if name not in NOT_BY_DEFAULT]
    lenses = {name: find_lens(name)(name=name) for name in names}
    if READS_IMAGES in lenses:
        raise RegardError(f"--lens {READS_IMAGES} looks at images; give --image FILE with it.")
    if heads is not None:
        if "patterns" not in lenses:
            raise RegardError("--heads says whose patterns to keep; give --lens patterns with it.")
        lenses["patterns"] = Patterns(name="patterns", heads=heads)
    return lenses


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
        known: how many tokens the model knows.
        longest: how many it takes, where that is known.
    """

    model: Any
    tokenizer: Any
    anatomy: Anatomy
    name: str
    origin: str
    ids: Tensor
    known: int
    longest: int | None

    @classmethod
    def of(
        cls,
        source: str | None,
        text: str,
        origin: str,
        layers: list[int] | None = None,
        dtype: str | None = None,
        device: str | None = None,
        lenses: dict[str, Lens] | None = None,
        special: bool = True,
    ) -> Look:
        """Load a model and encode a text; what can be refused before weights are read is.

        Args:
            special: whether the tokenizer adds special tokens, such as one in front.

        Raises:
            RegardError: where either cannot be done, the text is too long or too short for the model, or
                the model has no such layer, or not the heads that a lens asks for.
        """
        check_dtype(dtype)
        check_device(device)
        found = Source.find(source)
        with busy(f"Preparing {found.name}"):
            fit.check_reads_text(found)
            check_depth(layers, found.config)
            skeleton = root_of(found.skeleton())
            known, longest = _check_parts(skeleton, found.name, layers, lenses or {})
            encoded = found.tokenizer(text, return_tensors="pt", verbose=False, add_special_tokens=special)
            ids = encoded["input_ids"].long()
            fit.check_length(ids.shape[1], longest, found.name)
            fit.check_vocabulary(ids, known, found.name)
            _check_patterns(ids.shape[1], lenses or {})
        with busy(f"Loading {found.name}"):
            root = root_of(found.read(dtype, device))
        ids = ids.to(root.device)
        return cls(root, found.tokenizer, anatomy_of(root), found.name, origin, ids, known, longest)

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]

    @property
    def layers(self) -> int:
        return sum(site.kind == self.anatomy.main for site in self.anatomy.sites)

    @property
    def heads(self) -> int:
        return sum(site.heads or 0 for site in self.anatomy.sites if site.kind == self.anatomy.main)

    @property
    def size(self) -> str:
        """The model in words: layers, heads, class, and how much of its attention is out of reach."""
        layers = "1 layer" if self.layers == 1 else f"{self.layers} layers"
        beyond = len(self.anatomy.unreachable)
        hidden = f"; {beyond} attention modules are out of reach" if beyond else ""
        return f"{layers}, {self.heads} heads in all ({type(self.model).__name__}){hidden}"

    @property
    def probe_length(self) -> int:
        return PROBE_LENGTH if self.longest is None else min(PROBE_LENGTH, self.longest // 2)

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
        return self.run(self.ids, lenses, layers, f"Reading {self.tokens} tokens", all_of)

    def at_probe(
        self, lenses: dict[str, Lens], layers: list[int] | None, seed: int = PROBE_SEED
    ) -> dict[str, Any]:
        """Return those of the lenses that ask for repetition, on random tokens repeated once.

        The control that natural text lacks: nothing but repetition can tell what comes next.
        """
        chosen = {name: lens for name, lens in lenses.items() if name in (*PROBE_LENSES, RECORDER)}
        if not any(name in PROBE_LENSES for name in chosen) or self.probe_length < 2:
            return {}
        generator = torch.Generator().manual_seed(seed)
        size = min(self.known, len(self.tokenizer))
        half = torch.randint(0, size, (1, self.probe_length), generator=generator)
        ids = torch.cat([half, half], 1).to(self.ids.device)
        return self.run(ids, chosen, layers, "Reading the probe", False)

    def run(
        self, ids: Tensor, lenses: dict[str, Lens], layers: list[int] | None, title: str, all_of: bool
    ) -> dict[str, Any]:
        """Return the results of the lenses on any tokens [1, T]."""
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
            out = self.model(input_ids=ids, **options)[0]
        except RegardError:
            raise
        except Exception as error:
            if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
                raise RegardError(
                    f"{self.name} ran out of memory on {ids.shape[1]} tokens; give a shorter text."
                ) from error
            if is_ours(error):
                raise
            raise UnsupportedModel(
                f"{self.name} ({type(self.model).__name__}) does not run on text alone "
                f"({first_sentence(error)}); watch it in Python."
            ) from error
        if isinstance(out, Tensor) and bool(out.isnan().any()):
            kind = str(self.model.dtype).removeprefix("torch.")
            raise RegardError(
                f"{self.name} computes numbers that are not finite in {kind}; give another --dtype, or look "
                "at its weights."
            )


def is_ours(error: BaseException) -> bool:
    """Whether an error began in regard itself, where it is a fault to be seen and not a model's refusal."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and str(place.tb_frame.f_globals.get("__name__")).startswith("regard.")


@contextmanager
def _stepping(model: Any, title: str, total: int) -> Iterator[None]:
    """A bar on a terminal that moves on with every attention call of `model`."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    with busy(title, total) as advance, watch(model, _Step(advance)):
        yield


def _check_parts(
    skeleton: Any, name: str, layers: list[int] | None, lenses: dict[str, Lens]
) -> tuple[int, int | None]:
    """Return how many tokens a model knows, and how many it takes; refuse one that cannot be looked at."""
    anatomy = anatomy_of(skeleton)
    require_attention(anatomy)
    known = fit.check_takes_tokens(skeleton, anatomy, name)
    check_layers(layers, anatomy)
    watch(skeleton, *lenses.values(), layers=layers)
    return known, fit.longest(skeleton)


def _check_patterns(length: int, lenses: dict[str, Lens]) -> None:
    """Refuse to keep the patterns of all heads of a long text, before it is read."""
    lens = lenses.get("patterns")
    if isinstance(lens, Patterns) and lens.heads is None and length > (lens.max_tokens or 0):
        raise RegardError(
            f"--lens patterns keeps all heads of up to {lens.max_tokens} tokens, and the text has {length}; "
            "name some heads, such as --heads 0.0,0.1."
        )
