"""Small random Llamas of transformers: one with a tokenizer, for what needs a pretrained model."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from regard.tasks.corpus import Corpus


def tiny_llama(data: Corpus) -> tuple[Any, Any]:
    """Return a model of one layer in the vocabulary of a corpus, and the corpus' tokenizer.

    Example:
        >>> from regard.tasks.corpus import packaged
        >>> model, tokenizer = tiny_llama(packaged(256))
        >>> model.config.vocab_size, len(tokenizer)
        (256, 256)
    """
    config = LlamaConfig(
        vocab_size=data.vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=data.tokenizer)


def random_llama(
    vocabulary: int, *, width: int = 64, layers: int = 3, heads: int = 4, key_heads: int = 2, mlp: int = 128
) -> Any:
    """Return a model of given sizes without a tokenizer, its weights drawn by torch's generator.

    Example:
        >>> sum(p.numel() for p in random_llama(49).parameters())
        117312
    """
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)
