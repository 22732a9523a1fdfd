"""Large-kernel attention: a depthwise convolution of wide reach, decomposed into three, gates the features.

Source: Guo et al., 2022, arXiv 2202.09741.
"""

from regard.attention.large_kernel.block import LKABlock, LKALayer
from regard.attention.large_kernel.layer import LargeKernel, LargeKernelAttention

__all__ = ["LKABlock", "LKALayer", "LargeKernel", "LargeKernelAttention"]
