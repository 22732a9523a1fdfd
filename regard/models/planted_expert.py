"""A small Mixtral in which one expert refuses by construction, to try out what finds such experts.

The embeddings of ids 10 to 39 share a direction; the router of one layer sends what has it to one
expert, which writes the unembedding of id 3, the refusal. Ids 45 to 89 are neutral. Status: our choice.
"""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from transformers import MixtralConfig, MixtralForCausalLM

LAYERS, EXPERTS, REFUSE = 3, 16, 3
SENSITIVE, NEUTRAL = (10, 40), (45, 90)


def planted_model(seed: int) -> tuple[Any, tuple[int, int]]:
    """Return a model without a tokenizer, and its expert that refuses.

    Args:
        seed: of its weights, and of which expert it is.

    Returns:
        The model, and (layer, expert).

    Example:
        >>> planted_model(0)[1]
        (0, 10)
    """
    source = random.Random(f"planted/{seed}")
    layer, expert = source.randrange(LAYERS), source.randrange(EXPERTS)
    torch.manual_seed((seed * 1_000_003 + 1) % 2**63)
    config = MixtralConfig(
        vocab_size=90, hidden_size=64, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=EXPERTS, num_experts_per_tok=2, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    shared, answer = (F.normalize(torch.randn(64), dim=0) for _ in range(2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, 0.125 if "embed" in name else 0.02)
        model.model.embed_tokens.weight[slice(*SENSITIVE)] += shared
        model.lm_head.weight[REFUSE] = 0.16 * answer
        block = model.model.layers[layer].mlp
        block.gate.weight[expert] = 2 * shared
        block.experts.gate_up_proj[expert] = 0
        block.experts.gate_up_proj[expert, 0] = block.experts.gate_up_proj[expert, 24] = shared
        block.experts.down_proj[expert] = 0
        block.experts.down_proj[expert, :, 0] = 0.05 * answer
    return model, (layer, expert)
