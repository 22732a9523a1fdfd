"""What a family of models needs beyond the general rules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Family:
    """What one architecture needs beyond the general rules.

    Attributes:
        cls: the model class, where it is not the one that `Architecture.main_class` picks.
        config: fields of the configuration, nested as it is.
        given: inputs as they are, instead of those of the general rules; a function makes one afresh.
        drop: inputs of the general rules that are left out; what they would bring is never seen.
        generates: whether `generate()` is run.
        impossible: why it is not run here, in words, where it is not.
    """

    cls: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    generates: bool = True
    impossible: str = ""
