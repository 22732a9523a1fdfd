"""What is shown while weights are fetched and read: one progress bar, on a terminal only."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def busy(title: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """Show a bar and the time passed while the block runs, on standard error where that is a terminal.

    The bar is gone afterwards. Such blocks do not nest.

    Args:
        total: number of steps, where it is known.

    Returns:
        A context manager that gives a function to call after each step.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    share = () if total is None else (TaskProgressColumn(),)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), *share, TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and warnings of transformers and the Hub while the block runs."""
    from huggingface_hub.utils import logging as hub
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    verbosity, bars, hub_verbosity = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        hub.get_verbosity(),
    )
    loop: Any = getattr(gguf, "tqdm", None)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub.set_verbosity_error()
    if loop is not None:
        gguf.tqdm = functools.partial(loop, disable=True)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        hub.set_verbosity(hub_verbosity)
        if bars:
            logging.enable_progress_bar()
        if loop is not None:
            gguf.tqdm = loop
