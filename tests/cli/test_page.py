"""A page: styled and wrapped on a terminal, plain and unbroken elsewhere."""

import io
import os
import sys

import pytest

from regard.cli.page import Page


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def printed(monkeypatch):
    """What a page of one line and one sentence looks like on a stream."""

    def run(stream, columns=40, **env):
        for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"TERM": "xterm-256color", **env}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("shutil.get_terminal_size", lambda *_: os.terminal_size((columns, 20)))
        monkeypatch.setattr(sys, "stdout", stream)
        page = Page()
        page.line("A [bold]heading[/bold] :smile: of a page that is not so short", "red")
        page.sentence("A sentence that goes on for longer than one line of a terminal has room for.")
        page.show()
        return stream.getvalue()

    return run


HEADING = "A [bold]heading[/bold] :smile: of a page that is not so short"


def test_away_from_a_terminal(printed):
    sentence = "  A sentence that goes on for longer than one line of a terminal has room for."
    assert printed(io.StringIO(), COLUMNS="20") == f"{HEADING}\n{sentence}\n"
    assert printed(io.StringIO(), NO_COLOR="1") == f"{HEADING}\n{sentence}\n"


def test_on_a_terminal(printed):
    assert printed(Terminal(), TERM="dumb").splitlines() == [
        "A [bold]heading[/bold] :smile: of a page",
        "that is not so short",
        "  A sentence that goes on for longer",
        "    than one line of a terminal has room",
        "    for.",
    ]


def test_colours(printed):
    assert "\x1b[31mA [bold]" in printed(Terminal())
    assert "\x1b[31m" not in printed(Terminal(), NO_COLOR="1")
    assert "\x1b" not in printed(Terminal(), TERM="dumb")
    assert "\x1b[31mA [bold]" in printed(io.StringIO(), FORCE_COLOR="1")


@pytest.mark.parametrize(("encoding", "holds"), [("utf-8", True), ("ascii", False), ("cp437", True)])
def test_which_characters_a_stream_holds(encoding, holds, monkeypatch):
    stream = Terminal()
    stream.encoding = encoding
    monkeypatch.setattr(sys, "stdout", stream)
    assert Page().holds("░▒▓█") is holds
