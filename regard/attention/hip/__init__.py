"""HiP attention: to a window, the first tokens, and keys found by a binary search in a tree, block by block.

    for a block Q of b_q queries and a head, T the number of keys that its last query sees:
    span    = keys s .. T - w - 1, in blocks of b_k; tiled by K = ceil(k / b_k) stretches
    repeat    halve every stretch; score(half) = max_(i in Q, j in its middle block) q_i . k_j; keep K best
    until     stretches are blocks                                                 log2(span / k) rounds
    row i     softmax over { j < s } + { j in its K blocks } + { pos_i - w <= j < pos_i }

pos_i is the number of keys that query i may see. Every query sees the w last keys, itself among them, and the
s first; no key counts twice.

Source: Lee et al., 2024, arXiv 2406.09827 (v2 and 3; `variant="v1"` is of version 1). Status: with two
queries a block the search agrees with the official one for a CPU; with 64 a fifth of the blocks differ,
probably for that one scores keys too that some of the queries have in their window. What its GPU kernels do
otherwise (chunks aligned to powers of two, ranking by a sigmoid in bfloat16) is left out. How padding is
treated is our choice.
"""

from regard.attention.hip.call import HiPMask, hip_attention, hip_mask
from regard.attention.hip.heads import HiPAttention
from regard.attention.hip.spec import PRESETS, HiP

__all__ = ["PRESETS", "HiP", "HiPAttention", "HiPMask", "hip_attention", "hip_mask"]
