"""A page of text for standard output: styled and wrapped on a terminal, plain and unbroken anywhere else."""

from __future__ import annotations

import io
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING

from regard.cli.command import say

if TYPE_CHECKING:
    from rich.text import Text

NARROWEST = 20


class Page:
    """Lines collected, and written at once by `show`.

    Colours follow the terminal, `NO_COLOR`, `FORCE_COLOR` and `TERM`.

    Attributes:
        width: columns of the terminal, or None where there is none and a line may be of any length.
    """

    def __init__(self) -> None:
        from rich.console import Console

        terminal = sys.stdout is not None and sys.stdout.isatty()
        self.width = max(NARROWEST, shutil.get_terminal_size().columns) if terminal else None
        self._console = Console(
            file=io.StringIO(), force_terminal=terminal or None, width=10_000, highlight=False, emoji=False
        )

    def line(self, text: str | Text = "", style: str = "") -> None:
        """Add one line, broken at words where the terminal ends."""
        from rich.text import Text

        line = Text(text, style) if isinstance(text, str) else text
        for part in [line] if self.width is None else line.wrap(self._console, self.width):
            self._console.print(part, soft_wrap=True)

    def sentence(self, text: str) -> None:
        """Add an indented sentence; its further lines, where the terminal ends, are indented more."""
        if self.width is None:
            self.line(f"  {text}")
            return
        for line in textwrap.wrap(text, self.width, initial_indent="  ", subsequent_indent="    "):
            self.line(line)

    def holds(self, characters: str) -> bool:
        """Whether standard output has all these characters."""
        try:
            characters.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
        except UnicodeEncodeError:
            return False
        return True

    def show(self) -> None:
        """Write everything."""
        file = self._console.file
        assert isinstance(file, io.StringIO)
        say(file.getvalue())
