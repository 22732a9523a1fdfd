"""Registers the attention implementation `regard` with transformers, once, with lazy and with dense masks."""

from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from regard.runtime.function import regard_attention
from regard.runtime.implementation import DENSE, NAME
from regard.runtime.mask import dense_mask, lazy_mask

AttentionInterface.register(NAME, regard_attention)
AttentionMaskInterface.register(NAME, lazy_mask)
AttentionInterface.register(DENSE, regard_attention)
AttentionMaskInterface.register(DENSE, dense_mask)
