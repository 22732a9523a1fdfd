"""Tiny random-weight models of every family that the runtime is tested on, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf

VOCAB = 97
LENGTH = 9
FAMILIES: dict[str, Family] = {}


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        make: returns a model with the given attention implementation.
        feed: `feed(model, padding)` returns keyword arguments of a forward; batch 2.
        generative: whether `generate()` works on what `feed` gives.
        pads: whether a 2-D attention mask is understood.
        route: by which road its attention is reached.
        static: whether a static cache works.
    """

    name: str
    make: Callable[[str], Any]
    feed: Callable[[Any, str], dict[str, Any]]
    generative: bool = True
    pads: bool = True
    route: str = "interface"
    static: bool = True
    plain: str = "eager"

    def build(self, attn: str | None = None, seed: int = 0) -> Any:
        """Return the model in evaluation mode, its weights drawn so that attention is not uniform."""
        torch.manual_seed(seed)
        model = self.make(attn or self.plain).eval()
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if "norm" in name.lower() or "ln_" in name or "layer_norm" in name:
                    parameter.copy_(parameter + 0.1 * noise)
                else:
                    parameter.copy_(0.25 * noise)
        return model

    def inputs(self, model: Any, padding: str = "none") -> dict[str, Any]:
        """Return keyword arguments of a forward; padding is 'none', 'left' or 'right'."""
        return self.feed(model, padding)


def valid(inputs: dict[str, Any], shape: torch.Size) -> torch.Tensor:
    """Return which positions of an output [B, T, ...] are real, bool [B, T]."""
    mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
    if "decoder_input_ids" in inputs or mask is None or mask.shape != shape[:2]:
        return torch.ones(shape[:2], dtype=torch.bool)
    return mask.bool()


def padding_mask(padding: str, length: int = LENGTH, batch: int = 2) -> torch.Tensor:
    """Return a [B, T] mask whose first sequence has three padded positions."""
    mask = torch.ones(batch, length, dtype=torch.long)
    if padding == "left":
        mask[0, :3] = 0
    if padding == "right":
        mask[0, -3:] = 0
    return mask


def tokens(seed: int = 3, length: int = LENGTH, low: int = 5, high: int = VOCAB) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (2, length), generator=generator)


def feed_text(model: Any, padding: str) -> dict[str, Any]:
    if padding == "none":
        return {"input_ids": tokens()}
    mask = padding_mask(padding)
    return {"input_ids": tokens(), "attention_mask": mask}


def feed_image(model: Any, padding: str) -> dict[str, Any]:
    config = getattr(model.config, "vision_config", model.config)
    size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    generator = torch.Generator().manual_seed(5)
    return {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}


def feed_clip(model: Any, padding: str) -> dict[str, Any]:
    return {**feed_text(model, padding), **feed_image(model, padding)}


def feed_seq2seq(model: Any, padding: str) -> dict[str, Any]:
    return {**feed_text(model, padding), "decoder_input_ids": tokens(7, 5)}


def feed_whisper(model: Any, padding: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(2, model.config.num_mel_bins, 32, generator=generator)
    return {"input_features": features, "decoder_input_ids": tokens(7, 5)}


def feed_llava(model: Any, padding: str) -> dict[str, Any]:
    ids = tokens(3, 14)
    ids[:, 4:8] = model.config.image_token_id
    inputs = {**feed_image(model, padding), "input_ids": ids}
    if padding != "none":
        inputs["attention_mask"] = padding_mask(padding, 14)
    return inputs


def feed_gemma3_images(model: Any, padding: str) -> dict[str, Any]:
    inputs = feed_llava(model, padding)
    inputs["token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).long()
    return inputs


def feed_qwen2_vl(model: Any, padding: str) -> dict[str, Any]:
    ids = tokens(3, 12)
    ids[:, 3] = model.config.vision_start_token_id
    ids[:, 4:8] = model.config.image_token_id
    ids[:, 8] = model.config.vision_end_token_id
    generator = torch.Generator().manual_seed(5)
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    pixels = torch.randn(32, 3 * 2 * 4 * 4, generator=generator)
    inputs = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid}
    inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    if padding != "none":
        inputs["attention_mask"] = padding_mask(padding, 12)
    return inputs


def _decoder(model_name: str, config_name: str, **options: Any) -> Callable[[str], Any]:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }

    def make(attn: str) -> Any:
        config = getattr(tf, config_name)(**{**sizes, **options}, attn_implementation=attn)
        return getattr(tf, model_name)(config)

    return make


def _of(model_name: str, config_name: str, **options: Any) -> Callable[[str], Any]:
    def make(attn: str) -> Any:
        config = getattr(tf, config_name)(**options, attn_implementation=attn)
        return getattr(tf, model_name)(config)

    return make


def _add(name: str, make: Callable[[str], Any], feed: Any = feed_text, **flags: Any) -> None:
    FAMILIES[name] = Family(name, make, feed, **flags)


MOE = {"num_experts_per_tok": 2}
_add("llama", _decoder("LlamaForCausalLM", "LlamaConfig"))
_add("mistral", _decoder("MistralForCausalLM", "MistralConfig", sliding_window=4))
_add("qwen2", _decoder("Qwen2ForCausalLM", "Qwen2Config"))
_add("qwen3", _decoder("Qwen3ForCausalLM", "Qwen3Config", head_dim=8))
_add("gemma2", _decoder("Gemma2ForCausalLM", "Gemma2Config", head_dim=8, sliding_window=4,
                        attn_logit_softcapping=2.0, query_pre_attn_scalar=4))  # fmt: skip
_add("gemma3", _decoder("Gemma3ForCausalLM", "Gemma3TextConfig", head_dim=8, sliding_window=4,
                        layer_types=["sliding_attention", "full_attention"]))  # fmt: skip
_add("phi", _decoder("PhiForCausalLM", "PhiConfig"))
_add("phi3", _decoder("Phi3ForCausalLM", "Phi3Config"))
_add("gpt-neox", _decoder("GPTNeoXForCausalLM", "GPTNeoXConfig"))
_add("mixtral", _decoder("MixtralForCausalLM", "MixtralConfig", num_local_experts=4, **MOE))
_add("olmoe", _decoder("OlmoeForCausalLM", "OlmoeConfig", num_experts=4, **MOE))
_add("gpt-oss", _decoder("GptOssForCausalLM", "GptOssConfig", head_dim=8, sliding_window=4,
                         num_local_experts=4, **MOE))  # fmt: skip
_add("deepseek", _decoder(
    "DeepseekV3ForCausalLM", "DeepseekV3Config", num_key_value_heads=4, n_routed_experts=4,
    n_group=1, topk_group=1, moe_intermediate_size=16, n_shared_experts=1, first_k_dense_replace=1,
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=6, **MOE,
))  # fmt: skip
_add("gpt2", _of("GPT2LMHeadModel", "GPT2Config", vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4,
                 n_positions=128, bos_token_id=1, eos_token_id=None, pad_token_id=0))  # fmt: skip
_add("opt", _of("OPTForCausalLM", "OPTConfig", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2,
                num_attention_heads=4, ffn_dim=48, max_position_embeddings=128, word_embed_proj_dim=32,
                pad_token_id=0, bos_token_id=1, eos_token_id=None))  # fmt: skip
_add("falcon", _of("FalconForCausalLM", "FalconConfig", vocab_size=VOCAB, hidden_size=32,
                   num_hidden_layers=2, num_attention_heads=4, new_decoder_architecture=True,
                   num_kv_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None),
     route="sdpa", plain="sdpa", static=False)  # fmt: skip

ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IMAGE = {"image_size": 8, "patch_size": 2}
_add("bert", _of("BertModel", "BertConfig", vocab_size=VOCAB, **ENCODER), generative=False)
_add("modernbert", _of("ModernBertModel", "ModernBertConfig", vocab_size=VOCAB, local_attention=4,
                       pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
                       **ENCODER), generative=False)  # fmt: skip
_add("vit", _of("ViTModel", "ViTConfig", **IMAGE, **ENCODER), feed_image, generative=False, pads=False)
_add("swin", _of("SwinModel", "SwinConfig", image_size=16, patch_size=2, embed_dim=16, depths=[2, 2],
                 num_heads=[2, 4], window_size=4), feed_image, generative=False, pads=False)  # fmt: skip


def _clip(attn: str) -> Any:
    text = {**ENCODER, "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = tf.CLIPConfig(
        text_config=text, vision_config={**ENCODER, **IMAGE}, projection_dim=16, attn_implementation=attn
    )
    return tf.CLIPModel(config)


_add("clip", _clip, feed_clip, generative=False)
_add("t5", _of("T5ForConditionalGeneration", "T5Config", vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48,
               num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=None,
               decoder_start_token_id=0), feed_seq2seq)  # fmt: skip
_add("bart", _of("BartForConditionalGeneration", "BartConfig", vocab_size=VOCAB, d_model=32,
                 encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                 decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
                 max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=None,
                 forced_eos_token_id=None, decoder_start_token_id=2), feed_seq2seq)  # fmt: skip
_add("whisper", _of("WhisperForConditionalGeneration", "WhisperConfig", vocab_size=VOCAB, d_model=32,
                    encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8,
                    max_source_positions=16, max_target_positions=64, pad_token_id=0, bos_token_id=1,
                    eos_token_id=2, decoder_start_token_id=2, suppress_tokens=None,
                    begin_suppress_tokens=None), feed_whisper, pads=False, generative=False)  # fmt: skip

LLAMA_TEXT = {
    **ENCODER, "model_type": "llama", "vocab_size": VOCAB + 3, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip


def _llava(attn: str) -> Any:
    vision = {**ENCODER, "image_size": 8, "patch_size": 4, "model_type": "clip_vision_model"}
    config = tf.LlavaConfig(
        text_config=LLAMA_TEXT, vision_config=vision, image_token_id=VOCAB, vision_feature_layer=-1,
        attn_implementation=attn,
    )  # fmt: skip
    return tf.LlavaForConditionalGeneration(config)


_add("llava", _llava, feed_llava)


def _gemma3_images(attn: str) -> Any:
    text = {
        **LLAMA_TEXT, "model_type": "gemma3_text", "head_dim": 8, "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    vision = {**ENCODER, "image_size": 8, "patch_size": 2}
    config = tf.Gemma3Config(
        text_config=text, vision_config=vision, image_token_id=VOCAB, mm_tokens_per_image=4,
        attn_implementation=attn,
    )  # fmt: skip
    return tf.Gemma3ForConditionalGeneration(config)


_add("gemma3-images", _gemma3_images, feed_gemma3_images)


def _qwen2_vl(attn: str) -> Any:
    text = {
        **LLAMA_TEXT, "model_type": "qwen2_vl_text", "vocab_size": VOCAB + 9,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    }  # fmt: skip
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
    config = tf.Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=VOCAB, video_token_id=VOCAB + 1,
        vision_start_token_id=VOCAB + 2, vision_end_token_id=VOCAB + 3, attn_implementation=attn,
    )  # fmt: skip
    return tf.Qwen2VLForConditionalGeneration(config)


_add("qwen2-vl", _qwen2_vl, feed_qwen2_vl)


def gptj() -> Any:
    """A model whose attention cannot be reached."""
    config = tf.GPTJConfig(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)
    return tf.GPTJForCausalLM(config).eval()


def bloom() -> Any:
    """Another."""
    return tf.BloomForCausalLM(tf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)).eval()
