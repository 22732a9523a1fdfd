"""Language models."""

from __future__ import annotations

from tests.support.architectures.family import Family

FOUR_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2}
TWO_KINDS = ["linear_attention", "full_attention"]

FAMILIES: dict[str, Family] = {
    "bamba": Family(config={"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16}),
    "jamba": Family(config={"attn_layer_period": 2, "attn_layer_offset": 1}),
    "granitemoehybrid": Family(config={"layer_types": TWO_KINDS, "mamba_n_heads": 8, "mamba_d_head": 16}),
    "recurrent_gemma": Family(config={"num_hidden_layers": 3}),
    "zamba": Family(
        config={
            "num_hidden_layers": 3,
            "layers_block_type": ["linear_attention", "linear_attention", "hybrid"],
        }
    ),
    "nemotron_h": Family(config={"n_groups": 2, "mamba_num_heads": 8, "mamba_head_dim": 16}),
    "dots1": Family(config=FOUR_EXPERTS),
    "deepseek_v2": Family(config=FOUR_EXPERTS),
    "lfm2_moe": Family(config={"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "dbrx": Family(config={"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2}}),
    "decision_transformer": Family(cls="DecisionTransformerModel"),
    "markuplm": Family(),
    "xmod": Family(config={"default_language": "en_XX"}),
    "blt": Family(generates=False),
}
