"""Where weights come from: the default model, local folders, GGUF files and the Hub."""

from regard.weights.default import DEFAULT, cache_folder, default_folder
from regard.weights.source import Loaded, Source, load

__all__ = ["DEFAULT", "Loaded", "Source", "cache_folder", "default_folder", "load"]
