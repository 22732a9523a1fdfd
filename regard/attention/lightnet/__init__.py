"""LightNet: linear attention whose keys are a softmax over the sequence, so that one scan sees a whole grid.

Source: Qin et al., 2024, arXiv 2405.21022.
"""

from regard.attention.lightnet.function import lightnet_attention
from regard.attention.lightnet.heads import LightNet
from regard.attention.lightnet.layers import LightNetGrid, LightNetText
from regard.attention.lightnet.positions import MDLRPE, MDTPE, coordinates

__all__ = [
    "MDLRPE", "MDTPE", "LightNet", "LightNetGrid", "LightNetText", "coordinates", "lightnet_attention",
]  # fmt: skip
