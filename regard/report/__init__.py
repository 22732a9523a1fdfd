"""The report: one HTML file with what was found, the map of heads and their patterns."""

from regard.report.build import build
from regard.report.recorder import Recorder
from regard.report.report import Report, Section

__all__ = ["Recorder", "Report", "Section", "build"]
