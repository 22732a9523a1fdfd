"""Parsing, what is written where, and how the process ends; in processes of its own where that matters."""

import os
import signal
import subprocess
import sys
import time

import pytest

from regard import __version__
from regard.cli import command, main
from regard.errors import RegardError

RUN = [sys.executable, "-m", "regard.cli"]


def test_help_and_version(capsys):
    assert main(["--help"]) == main([]) == 0
    assert capsys.readouterr().out.count("usage: regard ") == 2
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"regard {__version__}\n"


def test_every_command_has_help(capsys):
    for name in command.COMMANDS:
        assert main([name, "--help"]) == 0
        out, err = capsys.readouterr()
        assert out.startswith(f"usage: regard {name} ") and not err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["inspcet"], "invalid choice: 'inspcet'"),
        (["inspect", "--jsn", "x"], "unrecognized arguments: --jsn; see `regard inspect --help`."),
        (["inspect", "--json"], "argument --json: expected one argument"),
        (["inspect", "a", "b"], "unrecognized arguments: b"),
        (["inspect", "--lens"], "argument --lens: expected at least one argument"),
    ],
)
def test_words_that_are_no_command(words, said, capsys):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert said in err and err.startswith("regard: ") and err.count("\n") == 1 and not out


def test_errors_of_more_lines_are_told_in_one(capsys):
    command.complain("first\n  second.")
    assert capsys.readouterr().err == "regard: first second.\n"


def test_an_interruption(monkeypatch, capsys):
    def interrupted(words):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_run", interrupted)
    assert main([]) == 130
    assert capsys.readouterr().err == "regard: interrupted.\n"


def test_the_handler_of_signals_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    main(["--version"])
    assert signal.getsignal(signal.SIGTERM) is before


def test_being_asked_to_end_runs_every_finally(tmp_path):
    code = (
        "import pathlib, time, regard.cli.command as c\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "def work(words):\n"
        "    try:\n"
        "        (folder / 'half').touch(); time.sleep(60)\n"
        "    finally:\n"
        "        (folder / 'half').unlink()\n"
        "c._run = work\n"
        "raise SystemExit(c.main([]))"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        while not (tmp_path / "half").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk():
    with open("/dev/full", "w") as full:
        done = subprocess.run([*RUN, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "regard: Standard output cannot be written to: No space left on device.\n"


def test_a_reader_who_has_gone():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*RUN, "--help"], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("closed", ["1", "2", "1 2"])
def test_closed_streams(closed):
    words = [*RUN, "bogus" if "2" in closed else "--help", *(f"{number}>&-" for number in closed.split())]
    done = subprocess.run(["/bin/sh", "-c", " ".join(words)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (2 if "2" in closed else 0, "", "")


def test_what_an_encoding_cannot_hold():
    code = "from regard.cli.command import say; say('é ░ \\udcff x\\n')"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"? ? ? x\n", b"")


def test_say_tells_why_it_cannot(monkeypatch):
    class Full:
        encoding = "utf-8"

        def write(self, text):
            raise OSError(28, "No space left on device")

        def fileno(self):
            raise OSError

    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(RegardError, match="No space left on device"):
        command.say("x")
