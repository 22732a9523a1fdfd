"""A small DistilBERT of transformers that classifies texts, with fresh weights."""

from __future__ import annotations

from typing import Any

from transformers import DistilBertConfig, DistilBertForSequenceClassification


def tiny_distilbert(
    vocabulary: int, classes: int = 2, *, dim: int = 64, layers: int = 2, heads: int = 4, longest: int = 64
) -> Any:
    """Return a classifier that reads its first token; 0 is padding.

    Example:
        >>> model = tiny_distilbert(50, 3, dim=16)
        >>> model.config.num_labels, len(model.distilbert.transformer.layer)
        (3, 2)
    """
    config = DistilBertConfig(
        vocab_size=vocabulary, num_labels=classes, dim=dim, n_layers=layers, n_heads=heads,
        hidden_dim=2 * dim, max_position_embeddings=longest, pad_token_id=0, dropout=0.1,
        attention_dropout=0.1,
    )  # fmt: skip
    return DistilBertForSequenceClassification(config)
