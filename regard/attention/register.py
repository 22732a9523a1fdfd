"""Registers what transformers must know of, once its modeling code is loaded."""

from regard.attention import kept as _kept  # noqa: F401
from regard.attention import placed_routers as _placed_routers  # noqa: F401
from regard.runtime import register as _register  # noqa: F401
