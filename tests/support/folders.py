"""Tiny models on disk, as a user has them: config, safetensors and tokenizer, or one GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ("the", "keeper", "wrote", "one", "line", "a", "day")
SPECIAL = ("[UNK]", "[PAD]", "[CLS]", "[SEP]")
VOCAB = 60
TEXT = "the keeper wrote one line a day the keeper wrote one line"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def add_tokenizer(folder: Path, *, size: int = VOCAB, framed: bool = False) -> None:
    """Write a tokenizer of one token a word: WORDS, then `w0`, `w1`, ... up to `size` tokens."""
    more = [f"w{i}" for i in range(size - len(SPECIAL) - len(WORDS))]
    known = {word: i for i, word in enumerate((*SPECIAL, *WORDS, *more))}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if framed:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def save(model: Any, folder: Path, **tokenizer: Any) -> Path:
    """Write a model whose attention is far from even, and a tokenizer beside it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name.lower():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    add_tokenizer(folder, **tokenizer)
    return folder


def llama(folder: Path, **options: Any) -> Path:
    """Write a decoder that takes 64 tokens."""
    defaults = {"vocab_size": VOCAB, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return save(tf.LlamaForCausalLM(tf.LlamaConfig(**{**SIZES, **defaults, **options})), folder)


def bert(folder: Path) -> Path:
    """Write an encoder."""
    return save(tf.BertForMaskedLM(tf.BertConfig(vocab_size=VOCAB, **SIZES)), folder, framed=True)


def roberta(folder: Path) -> Path:
    """Write an encoder whose table of 22 positions has room for 20 tokens."""
    config = tf.RobertaConfig(vocab_size=VOCAB, max_position_embeddings=22, **SIZES)
    return save(tf.RobertaForMaskedLM(config), folder, framed=True)


def t5(folder: Path) -> Path:
    """Write an encoder-decoder."""
    config = tf.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return save(tf.T5ForConditionalGeneration(config), folder)


def vit(folder: Path) -> Path:
    """Write a model of images, with a tokenizer that is none of its business."""
    return save(tf.ViTForImageClassification(tf.ViTConfig(image_size=16, patch_size=4, **SIZES)), folder)


def clip(folder: Path) -> Path:
    """Write a model that takes an image and a text."""
    config = tf.CLIPConfig(
        text_config={"vocab_size": VOCAB, **SIZES}, vision_config={"image_size": 16, "patch_size": 4, **SIZES}
    )
    return save(tf.CLIPModel(config), folder)


def mamba(folder: Path) -> Path:
    """Write a model without attention."""
    config = tf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)
    return save(tf.MambaForCausalLM(config), folder)


def gguf(path: Path, seed: int = 0) -> Path:
    """Write a Llama of 2 layers and 4 heads as one GGUF file, its tokenizer inside."""
    from gguf import GGUFWriter, TokenType

    size, inner, heads, kv, layers = 32, 48, 4, 2, 2
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(size)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_rope_dimension_count(size // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    tokens = ["<unk>", "<s>", "</s>", *(f"\u2581{w}" for w in WORDS)]
    tokens += [chr(ord("a") + i) for i in range(26)] + ["\u2581"]
    tokens += [f"x{i}" for i in range(VOCAB - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([float(-i) for i in range(VOCAB)])
    writer.add_token_types(
        [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.NORMAL] * (VOCAB - 3)
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    random = np.random.default_rng(seed)

    def add(name: str, *shape: int) -> None:
        values = random.normal(size=shape, scale=0.3) if len(shape) > 1 else np.ones(shape)
        writer.add_tensor(name, values.astype(np.float32))

    add("token_embd.weight", VOCAB, size)
    add("output.weight", VOCAB, size)
    add("output_norm.weight", size)
    for i in range(layers):
        for name, out in (("attn_q", size), ("attn_k", size * kv // heads), ("attn_v", size * kv // heads)):
            add(f"blk.{i}.{name}.weight", out, size)
        add(f"blk.{i}.attn_output.weight", size, size)
        add(f"blk.{i}.ffn_gate.weight", inner, size)
        add(f"blk.{i}.ffn_up.weight", inner, size)
        add(f"blk.{i}.ffn_down.weight", size, inner)
        add(f"blk.{i}.attn_norm.weight", size)
        add(f"blk.{i}.ffn_norm.weight", size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
