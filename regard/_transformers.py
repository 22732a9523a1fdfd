"""Import a module of ours as soon as transformers' models are imported, and not before.

`import regard` is light, and yet `from_pretrained(..., attn_implementation="regard")` must find the
implementation registered. So importing `transformers.modeling_utils` is what triggers the registration.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

TRIGGER = "transformers.modeling_utils"


class _After(Loader):
    """Run the real loader, then import ours."""

    def __init__(self, real: Loader, then: str) -> None:
        self.real = real
        self.then = then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.real
        self.real.exec_module(module)
        importlib.import_module(self.then)


class _Watcher(MetaPathFinder):
    """Finds only the trigger, once."""

    def __init__(self, then: str) -> None:
        self.then = then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _After(spec.loader, self.then)
        return spec


def when_loaded(then: str) -> None:
    """Import the module `then` once transformers' modeling code is loaded, at once where it is."""
    if TRIGGER in sys.modules:
        importlib.import_module(then)
    else:
        sys.meta_path.insert(0, _Watcher(then))
