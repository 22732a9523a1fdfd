"""What a folder of weights holds, told from the names of its files."""

from __future__ import annotations

from pathlib import Path

from regard.errors import RegardError, UnsupportedModel

TOKENIZER_FILES = ("tokenizer*", "vocab*", "spiece*", "sentencepiece*", "*.tiktoken", "tekken.json")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def check_folder(path: Path) -> str | None:
    """Return the GGUF file to read, or None where the folder holds safetensors.

    Raises:
        RegardError: where it holds no weights, or several GGUF files.
        UnsupportedModel: where its only weights are pickle files.
    """
    ggufs = sorted(p.name for p in path.glob("*.gguf"))
    config = (path / "config.json").is_file()
    if config and any(path.glob("*.safetensors")):
        return None
    if len(ggufs) > 1:
        raise RegardError(f"{path} holds {len(ggufs)} .gguf files; give one, such as {path / ggufs[0]}.")
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


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a file that a tokenizer is read from."""
    return any(True for pattern in TOKENIZER_FILES for _ in folder.glob(pattern))
