"""Flow-Attention: linear attention in which sources compete for attention and targets are gated."""

from regard.attention.flow.call import flow_attention
from regard.attention.flow.heads import FlowAttentionHeads
from regard.attention.flow.layer import FlowMultiheadAttention
from regard.attention.flow.spec import PRESETS, FlowAttention

__all__ = ["PRESETS", "FlowAttention", "FlowAttentionHeads", "FlowMultiheadAttention", "flow_attention"]
