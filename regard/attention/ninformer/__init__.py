"""The NiNformer block (Abdullah and Aydin, 2024, arXiv 2403.02411): see `mixing`, `gating` and `block`."""

from regard.attention.ninformer.block import NiN, NiNBlock, cheaper_from, count_parameters
from regard.attention.ninformer.gating import NiNGating, NiNMixer
from regard.attention.ninformer.mixing import Fourier, Mixer

__all__ = ["Fourier", "Mixer", "NiN", "NiNBlock", "NiNGating", "NiNMixer", "cheaper_from", "count_parameters"]
