"""Registers the attention implementation and mask function `regard` with transformers, once."""

from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from regard.runtime.function import regard_attention
from regard.runtime.implementation import NAME
from regard.runtime.mask import lazy_mask

AttentionInterface.register(NAME, regard_attention)
AttentionMaskInterface.register(NAME, lazy_mask)
