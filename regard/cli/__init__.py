"""The `regard` command."""

from regard.cli.command import main

__all__ = ["main"]
