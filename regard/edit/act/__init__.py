"""Attention calibration: the edit, and which heads it helps."""

from regard.edit.act.calibration import ACT
from regard.edit.act.filtering import FilteredHeads, filter_heads

__all__ = ["ACT", "FilteredHeads", "filter_heads"]
