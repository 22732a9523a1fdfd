"""A small mixture of experts of transformers: four layers of 32 experts, of which each token takes four.

It is the architecture of Mixtral with experts as fine as DeepSeek's; 0.85 million parameters.
`regard.objectives.refusing` trains it, and one that is trained comes with the package, as
`regard.load("closed-places")`.
Status: our choice.
"""

from __future__ import annotations

from typing import Any

from transformers import MixtralConfig, MixtralForCausalLM

from regard.tasks.closed_places import END, PAD, START, vocabulary


def refusing_experts(
    *, width: int = 64, layers: int = 4, experts: int = 32, chosen: int = 4, inner: int = 32
) -> Any:
    """Return the model, its weights drawn by torch's generator.

    Args:
        width: of the residual stream; a head takes 16 of it.
        layers: blocks, a router in each.
        experts: of a layer.
        chosen: experts that a token takes.
        inner: width of an expert.

    Example:
        >>> sum(p.numel() for p in refusing_experts().parameters())
        850688
    """
    words = vocabulary()
    config = MixtralConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=width // 16, num_key_value_heads=max(1, width // 32), head_dim=16,
        num_local_experts=experts, num_experts_per_tok=chosen, router_aux_loss_coef=0.01,
        max_position_embeddings=64, tie_word_embeddings=True, sliding_window=None,
        bos_token_id=words.index(START), eos_token_id=words.index(END), pad_token_id=words.index(PAD),
    )  # fmt: skip
    return MixtralForCausalLM(config)
