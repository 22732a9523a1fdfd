"""Active-dormant heads: sinks, drained values and residual peaks, and how they differ between two domains."""

from regard.lens.extremes.contrast import ContrastTable, compare_sinks
from regard.lens.extremes.measure import Extremes, measure_sinks

__all__ = ["ContrastTable", "Extremes", "compare_sinks", "measure_sinks"]
