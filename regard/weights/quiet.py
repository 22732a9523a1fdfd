"""What is shown while weights are fetched and read: one progress bar, on a terminal only."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def busy(title: str) -> Iterator[None]:
    """Show a bar and the time passed while the block runs, on standard error where that is a terminal.

    The bar is gone afterwards. Such blocks do not nest.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(title, total=None)
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and warnings of transformers while the block runs."""
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    loop: Any = getattr(gguf, "tqdm", None)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if loop is not None:
        gguf.tqdm = functools.partial(loop, disable=True)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if loop is not None:
            gguf.tqdm = loop
