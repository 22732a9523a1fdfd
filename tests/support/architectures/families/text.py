"""Language models."""

from __future__ import annotations

import torch

from tests.support.architectures.family import Family
from tests.support.architectures.inputs import noise

STATES = {
    "states": noise(2, 5, 17), "actions": noise(2, 5, 4), "rewards": noise(2, 5, 1),
    "returns_to_go": noise(2, 5, 1), "timesteps": torch.arange(5).expand(2, 5),
    "attention_mask": torch.ones(2, 5, dtype=torch.long),
}  # fmt: skip
FOUR_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2}
ZAMBA = ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"]
TWO_KINDS = ["linear_attention", "full_attention"]

FAMILIES: dict[str, Family] = {
    "bamba": Family(config={"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16}),
    "jamba": Family(config={"attn_layer_period": 2, "attn_layer_offset": 1}),
    "granitemoehybrid": Family(config={"layer_types": TWO_KINDS, "mamba_n_heads": 8, "mamba_d_head": 16}),
    "recurrent_gemma": Family(config={"num_hidden_layers": 3}),
    "zamba": Family(config={"num_hidden_layers": 5, "layers_block_type": ZAMBA}),
    "nemotron_h": Family(config={"n_groups": 2, "mamba_num_heads": 8, "mamba_head_dim": 16}),
    "dots1": Family(config=FOUR_EXPERTS),
    "deepseek_v2": Family(config=FOUR_EXPERTS),
    "lfm2_moe": Family(config={"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "dbrx": Family(config={"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8}}),
    "decision_transformer": Family(cls="DecisionTransformerModel", given=STATES, generates=False),
    "markuplm": Family(
        config={"max_xpath_tag_unit_embeddings": 256, "max_xpath_subs_unit_embeddings": 1024, "max_depth": 50}
    ),
    "xmod": Family(config={"default_language": "en_XX"}),
    "blt": Family(given={"use_cache": False}, generates=False),
    "gemma3n": Family(cls="Gemma3nForCausalLM"),
    "gemma4": Family(cls="Gemma4ForCausalLM"),
    "embedding_gemma2": Family(cls="EmbeddingGemma2TextModel"),
    "marian": Family(cls="MarianMTModel"),
    "emu3": Family(cls="Emu3ForCausalLM"),
    "glm5_next": Family(config={"text_config": {"index_kpool": 2, "index_topk": 4}}),
    "qwen4_exp": Family(
        cls="Qwen4ExpForCausalLM",
        config={
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 4,
        },
    ),
    "muse_glimmer_assistant": Family(
        given={
            "noise_embeds": noise(2, 6, 64),
            "context_hidden_states": noise(2, 9, 320),
            "attention_mask": torch.ones(2, 15),
        },
        generates=False,
    ),
    "esmfold2": Family(impossible="folds proteins: this sweep makes no atoms and chains"),
}
