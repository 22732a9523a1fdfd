"""What a benchmark refuses with."""

from __future__ import annotations


class WrongResult(Exception):
    """A result is wrong, so its speed is not told."""
