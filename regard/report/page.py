"""The page's source put together: one HTML file that needs nothing else.

The script and style are named in the page's own security policy by their hashes: no other script runs, and
nothing is fetched.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from functools import cache
from importlib import resources
from string import Template
from typing import Any

SCRIPTS = (
    "dom", "colour", "patterns", "map", "rank", "text", "heat", "head", "planes", "imagehead", "findings",
    "lines", "tables", "graphs", "grids", "main",
)  # fmt: skip
STYLES = ("base", "parts", "images")


@cache
def _source(name: str) -> str:
    return (resources.files("regard.report") / "page" / name).read_text("utf-8")


@cache
def _script() -> str:
    parts = "\n".join(_source(f"{name}.js") for name in SCRIPTS)
    return f'(() => {{\n"use strict";\n{parts}\n}})();\n'


@cache
def _style() -> str:
    return "\n".join(_source(f"{name}.css") for name in STYLES)


def render(data: dict[str, Any], title: str, facts: Sequence[str], plain: Sequence[str]) -> str:
    """Return the page.

    Args:
        data: what the script reads, plain JSON values.
        title, facts: its head, text.
        plain: sentences for a reader without scripts.
    """
    from regard import __version__

    return Template(_source("page.html")).substitute(
        SCRIPT_HASH=_hash(_script()), STYLE_HASH=_hash(_style()), STYLE=_style(), SCRIPT=_script(),
        TITLE=html.escape(title), FACTS=" · ".join(html.escape(fact) for fact in facts),
        PLAIN="".join(f"<p>{html.escape(s)}</p>" for s in plain), DATA=as_json(data), VERSION=__version__,
    )  # fmt: skip


def as_json(data: dict[str, Any]) -> str:
    """Return JSON that can stand inside a script element: in ASCII, without `<`, `>` and `&`."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
    return f"'sha256-{digest}'"
