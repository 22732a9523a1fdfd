"""What is attached to a model while sessions are open: the edits and lenses, the hooks, the current run."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from regard.errors import RegardError
from regard.runtime.anatomy import Anatomy, anatomy_of
from regard.runtime.implementation import hold, release
from regard.runtime.planes import PlaneHooks
from regard.runtime.pointhooks import PointHooks
from regard.runtime.protocol import Edit, Lens, Stage
from regard.runtime.run import Run
from regard.runtime.site import Site
from regard.runtime.steps import Steps

T = TypeVar("T", bound=Stage)
BY_MODULE: weakref.WeakKeyDictionary[nn.Module, Attachment] = weakref.WeakKeyDictionary()


class Attachment:
    """One per model, shared by all sessions open on it.

    Attributes:
        edits, lenses: of all sessions, in the order in which they were added.
        run: the current run, or None between forwards.
        generating: counts the tokens that the `generate()` under way chose, or None.
        called: how often each site, by alias, was reached since attaching.
        served: ids of the edits that wanted something that has run.
        named_spans: what each open session calls which positions, by the session's id.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.anatomy: Anatomy = anatomy_of(root)
        self.sites: dict[nn.Module, Site] = {site.module: site for site in self.anatomy.sites}
        self.edits: list[Edit] = []
        self.lenses: list[Lens] = []
        self.run: Run | None = None
        self.last_run: Run | None = None
        self.called: dict[str, int] = {}
        self.served: set[int] = set()
        self.current: list[Site] = []
        self.sessions = 0
        self.forwards = 0
        self.generating: Steps | None = None
        self.named_spans: dict[int, Mapping[str, torch.Tensor]] = {}
        self.points = PointHooks(self)
        self.planes = PlaneHooks(self)
        self._undo: list[Any] = []

    @property
    def stages(self) -> list[Stage]:
        return [*self.edits, *self.lenses]

    @property
    def spans(self) -> dict[str, torch.Tensor]:
        """Spans of all sessions; of one name, those of the session opened last."""
        return {name: mask for spans in self.named_spans.values() for name, mask in spans.items()}

    def add(self, edits: list[Edit], lenses: list[Lens]) -> None:
        self.edits += edits
        self.lenses += lenses
        self.points.refresh()

    def remove(self, edits: list[Edit], lenses: list[Lens]) -> None:
        self.edits, self.lenses = _without(self.edits, edits), _without(self.lenses, lenses)
        self.served &= {id(edit) for edit in self.edits}
        self.points.refresh()

    @contextmanager
    def aside(self, edits: list[Edit], lenses: list[Lens], run: Run) -> Iterator[None]:
        """Serve these stages alone, with the spans of `run`, and forget afterwards that anything ran."""
        names = ("edits", "lenses", "run", "last_run", "called", "forwards", "generating", "named_spans")
        before = {name: getattr(self, name) for name in names}
        self.edits, self.lenses, self.called = list(edits), list(lenses), {}
        self.named_spans = {0: run.spans}
        self.generating = Steps(self)
        self.generating.count = int(run.grows)
        try:
            self.points.refresh()
            yield
        finally:
            vars(self).update(before)
            self.points.refresh()

    def attach(self) -> None:
        """Make the model's attention call ours; undone by `detach`."""
        from regard.runtime.driving import drive

        taken = [m for m in self.sites if m in BY_MODULE]
        if taken:
            raise RegardError(
                f"Part of this {type(self.root).__name__} is already attached as part of another model; "
                "open the sessions on one and the same model."
            )
        try:
            for module in self.sites:
                BY_MODULE[module] = self
            self._undo.append(lambda: [BY_MODULE.pop(m, None) for m in self.sites])
            configs = hold(self.anatomy)
            self._undo.append(lambda: release(configs))
            self._undo.extend(drive(self))
            self._undo.append(self.planes.clear)
            self.planes.install()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Leave the model as it was before `attach`."""
        self.points.clear()
        while self._undo:
            self._undo.pop()()
        self.run = None

    def run_for_call(self) -> Run:
        """The current run, or one of its own for a part of the model that is called alone.

        `generate()` calls an encoder alone.
        """
        if self.run is not None:
            return self.run
        alone = Run()
        alone.spans = self.spans
        return alone


def _without(stages: list[T], gone: Sequence[T]) -> list[T]:
    """Return `stages` without one of each of `gone`, the last: an edit may be open in two sessions."""
    kept = list(stages)
    for stage in reversed(gone):
        places = [i for i, s in enumerate(kept) if s is stage]
        if places:
            del kept[places[-1]]
    return kept


def in_backward() -> bool:
    """Whether autograd is running backward: gradient checkpointing then calls a forward again."""
    return torch._C._current_graph_task_id() != -1


_ATTACHMENTS: weakref.WeakKeyDictionary[nn.Module, Attachment] = weakref.WeakKeyDictionary()


def open_attachment(root: nn.Module) -> Attachment:
    """Hold the attachment of `root`, attaching it where no session is open on it."""
    if root not in _ATTACHMENTS:
        attachment = Attachment(root)
        attachment.attach()
        _ATTACHMENTS[root] = attachment
    _ATTACHMENTS[root].sessions += 1
    return _ATTACHMENTS[root]


def close_attachment(attachment: Attachment) -> None:
    """End one session's hold; the last one detaches."""
    attachment.sessions -= 1
    if attachment.sessions == 0:
        _ATTACHMENTS.pop(attachment.root, None)
        attachment.detach()
