"""What a system's own command is given: its options, and the model, text and progress bar it asks for."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from regard.cli import given
from regard.cli.command import Parser, say
from regard.errors import RegardError, UnsupportedModel

if TYPE_CHECKING:
    import torch

    from regard.weights import Source

ROWS = 8
LARGEST_SEED = 2**63 - 1


class Text(NamedTuple):
    """A text, and in words where it came from."""

    words: str
    origin: str


class SystemParser(Parser):
    """The parser that a system adds its arguments to; every system takes `--json`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_argument("--json", metavar="FILE|-", help="write all numbers as JSON; - is standard output")

    def takes(self, *names: str) -> None:
        """Add options that many systems share, which a `Request` then answers.

        Args:
            names: "model" for --model, --device and --dtype; "text" for --text; "seed" for --seed.
        """
        for name in names:
            _SHARED[name](self)


def _add_model(parser: Parser) -> None:
    parser.add_argument("--model", metavar="MODEL", help="folder, .gguf file or Hub name (default: SmolLM2)")
    parser.add_argument("--device", help="such as cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", help="such as float32 or bfloat16 (default: float32)")


def _add_text(parser: Parser) -> None:
    parser.add_argument("--text", metavar="FILE|-|WORDS", help="what to read (default: a packaged passage)")


def _add_seed(parser: Parser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default: 0)")


_SHARED: dict[str, Callable[[Parser], None]] = {"model": _add_model, "text": _add_text, "seed": _add_seed}


class Request:
    """What a user asked of one system. Nothing is loaded before the system asks for it.

    Attributes:
        slug: the system.
        options: the parsed arguments, its own and the shared ones.
        text: what to read; only where the system takes "text".
        path: where JSON goes, or None.
    """

    def __init__(self, slug: str, options: argparse.Namespace) -> None:
        self.slug, self.options = slug, options
        self.path: Path | None = None
        if options.json not in (None, "-"):
            self.path, _ = given.check_outputs(options.json, None)
        if hasattr(options, "text"):
            self.text = Text(*given.read_text(options.text))
        if not 0 <= getattr(options, "seed", 0) <= LARGEST_SEED:
            raise RegardError(f"--seed is {options.seed}; it must be at least 0 and below 2^63.")
        if hasattr(options, "model"):
            from regard.weights.source import check_device, check_dtype

            check_dtype(options.dtype)
            check_device(options.device)

    def answer(self) -> None:
        """Call the system's function, and write what it returns where --json says."""
        found = self.options.run(self)
        document = {"system": self.slug, **found}
        text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        if self.options.json == "-":
            say(text)
        elif self.path is not None:
            from regard.runtime.table import write_text

            write_text(self.path, text)

    def say(self, line: str = "") -> None:
        """Print a line; nothing where JSON goes to standard output."""
        if self.options.json != "-":
            say(line + "\n")

    @cached_property
    def generator(self) -> torch.Generator:
        """Everything random is drawn from it, on the CPU; seeded by --seed."""
        import torch

        return torch.Generator().manual_seed(self.options.seed)

    @cached_property
    def source(self) -> Source:
        """Where the model was found; its config and tokenizer are read without its weights."""
        from regard.weights import Source

        return Source.find(self.options.model)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of a model that reads one text.

        Raises:
            UnsupportedModel: where the model is no such, or has none.
        """
        found = self.source
        if getattr(found.config, "is_encoder_decoder", False):
            raise UnsupportedModel(f"{found.name} is an encoder-decoder, and {self.slug} reads one text.")
        if found.tokenizer is None:
            raise UnsupportedModel(f"{found.name} comes without a tokenizer, and {self.slug} reads text.")
        return found.tokenizer

    @cached_property
    def model(self) -> Any:
        """The model, in evaluation mode, on the device asked for."""
        from regard.weights.quiet import busy

        with busy(f"Loading {self.source.name}"):
            return self.source.read(self.options.dtype, self.options.device)

    def check_length(self, length: int) -> None:
        """Refuse more tokens than the model takes at once; its weights are not needed.

        Raises:
            RegardError: saying how many it takes.
        """
        longest = getattr(self.source.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(longest, int) and length > longest:
            raise RegardError(f"{self.source.name} takes at most {longest} tokens at once, not {length}.")

    @property
    def vocabulary(self) -> int:
        """How many tokens both the tokenizer and the model know."""
        return min(len(self.tokenizer), self.model.get_input_embeddings().weight.shape[0])

    def read(self, ids: torch.Tensor, title: str) -> None:
        """Run the model over token ids, a few rows at a time, with a bar; without gradients or a cache.

        Args:
            ids: [N, T], any device.
            title: what the bar says.

        Raises:
            UnsupportedModel: where the model does not run on token ids alone.
            RegardError: where rows are longer than it takes, it knows no such token, or memory runs out.
        """
        import torch

        self._check(ids)
        wanted = {"use_cache": False, "logits_to_keep": 1}
        known = inspect.signature(self.model.forward).parameters
        options = {name: value for name, value in wanted.items() if name in known}
        with self.progress(title, len(ids)) as advance, torch.no_grad():
            for rows in ids.to(self.model.device).split(ROWS):
                self._forward(rows, options)
                advance(len(rows))

    def _check(self, ids: torch.Tensor) -> None:
        name, known = self.source.name, self.model.get_input_embeddings().weight.shape[0]
        longest = getattr(self.source.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(longest, int) and ids.shape[1] > longest:
            raise RegardError(
                f"{name} takes at most {longest} tokens at once, and was to read {ids.shape[1]}."
            )
        if int(ids.max()) >= known:
            raise RegardError(
                f"The tokenizer of {name} gives token {int(ids.max())}; the model knows {known}."
            )

    def _forward(self, ids: torch.Tensor, options: dict[str, Any]) -> None:
        import torch

        from regard.weights.source import first_sentence

        name = self.source.name
        try:
            self.model(input_ids=ids, **options)
        except RegardError:
            raise
        except torch.OutOfMemoryError as error:
            raise RegardError(f"{name} ran out of memory on {len(ids)} x {ids.shape[1]} tokens.") from error
        except (TypeError, ValueError) as error:
            reason = first_sentence(error)
            raise UnsupportedModel(f"{name} does not run on token ids alone ({reason}).") from error

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a bar on standard error, where that is a terminal; yields the function that moves it on."""
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        if sys.stderr is None or not console.is_terminal:
            yield lambda steps: None
            return
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task(title, total=total)
            yield lambda steps: bar.advance(task, steps)
