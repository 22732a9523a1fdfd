"""A tiny random Llama of transformers with its tokenizer, for quick runs of what needs a pretrained model."""

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
