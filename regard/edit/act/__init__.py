"""Attention calibration: the edit, which tokens it takes attention from, and which heads it helps."""

from regard.edit.act.calibration import ACT
from regard.edit.act.filtering import FilteredHeads, filter_heads
from regard.edit.act.fitting import fit_heads
from regard.edit.act.hidden import SinkMap, sink_map

__all__ = ["ACT", "FilteredHeads", "SinkMap", "filter_heads", "fit_heads", "sink_map"]
