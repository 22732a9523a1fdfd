"""Tiny models on disk, made once, and the command run in this process."""

import pytest

from regard.cli import main
from tests.support import folders


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with one tiny model of each kind."""
    root = tmp_path_factory.mktemp("models")
    for make in (folders.llama, folders.bert, folders.roberta, folders.t5, folders.vit, folders.clip):
        make(root / make.__name__)
    folders.mamba(root / "mamba")
    (root / "gguf").mkdir()
    folders.gguf(root / "gguf" / "tiny.gguf")
    return root


@pytest.fixture
def regard(capsys):
    """Run the command with some words; returns (exit code, standard output, standard error).

    `inspect` is told to write no page, which has tests of its own in tests/report.
    """

    def run(*words):
        capsys.readouterr()
        words = (*words, "--no-report") if words[:1] == ("inspect",) else words
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refusal(regard):
    """The one sentence in which the command refuses some words, with exit code 2 and nothing printed."""

    def run(*words):
        code, out, err = regard(*words)
        assert (code, out) == (2, ""), err
        assert err.startswith("regard: ") and err.endswith((".\n", "?\n")) and err.count("\n") == 1, err
        return err.removeprefix("regard: ").strip()

    return run
