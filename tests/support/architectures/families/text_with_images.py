"""Language models that also read images."""

from __future__ import annotations

import torch

from tests.support.architectures.family import Family
from tests.support.architectures.inputs import noise, special, token_ids

ONE_IMAGE = {"pixel_values": noise(2, 1, 3, 32, 32)}
TWO_FRAMES = {"pixel_values": noise(32, 384)}
PATCHES = {"pixel_values": noise(32, 3, 8, 8)}
PLACE = {"image_token_index": special("image_token_id")}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
QUESTION = {"qformer_input_ids": token_ids(6)}

FAMILIES: dict[str, Family] = {
    "idefics": Family(given={**ONE_IMAGE, "image_attention_mask": torch.ones(2, 17, 1, dtype=torch.long)}),
    "idefics2": Family(given=ONE_IMAGE),
    "idefics3": Family(given=ONE_IMAGE),
    "smolvlm": Family(given=ONE_IMAGE),
    "instructblip": Family(given=QUESTION, config=PLACE),
    "blip_2": Family(config=PLACE),
    "instructblipvideo": Family(
        given={**QUESTION, "pixel_values": noise(2, 2, 3, 32, 32)},
        config={"video_token_index": special("image_token_id"), **PLACE},
    ),
    "aria": Family(config={"projector_patch_to_query_dict": {16: 4}}),
    "gemma3": Family(config={"mm_tokens_per_image": 4}),
    "t5gemma2": Family(config={"encoder": {"mm_tokens_per_image": 4}}),
    "chameleon": Family(
        config={"vocabulary_map": {"<image>": special("image_token_id")}}, drop=("pixel_values",)
    ),
    "ernie4_5_vl_moe": Family(
        config={"text_config": {"rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]}}}
    ),
    "cohere_compass": Family(
        config={"text_config": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}}}
    ),
    "granite4_vision": Family(cls="Granite4VisionTextModel"),
    "kosmos2": Family(
        given={"image_embeds_position_mask": torch.tensor([[0] * 5 + [1] * 4 + [0] * 8] * 2)},
        config={"latent_query_num": 4},
    ),
    "llama4": Family(config={"vision_config": {"intermediate_size": 256}}),
    "mllama": Family(
        given={
            "pixel_values": noise(2, 1, 4, 3, 32, 32),
            "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(2, 1, 4, dtype=torch.long),
            "cross_attention_mask": torch.ones(2, 17, 1, 4, dtype=torch.long),
        },
        config={
            "text_config": {"cross_attention_layers": [1]},
            "vision_config": {
                "intermediate_layers_indices": [0],
                "vision_output_dim": 128,
                "num_global_layers": 1,
            },
        },
    ),
    "molmo2": Family(
        config={"adapter_config": {"vision_feature_layer": [1, 0]}},
        drop=("pixel_values", "pixel_values_videos"),
    ),
    "muse_glimmer": Family(given=TWO_FRAMES, config={"out_hidden_size": 256}),
    "muse_spark": Family(given=TWO_FRAMES, drop=("input_values",), config={"out_hidden_size": 256}),
    "paddleocr_vl": Family(given=PATCHES),
    "kimi_k25": Family(given=PATCHES),
    "pix2struct": Family(
        given={
            "flattened_patches": torch.cat(
                [torch.arange(1, 19).view(1, 9, 2).expand(2, 9, 2).float(), noise(2, 9, 64)], -1
            )
        }
    ),
    "step3p7": Family(config={"text_config": {"sliding_window": 4}}),
    "video_llama_3": Family(given={"image_merge_sizes": torch.tensor([2, 2])}),
    "deepseek_ocr2": Family(
        config={
            "text_config": {"mlp_layer_types": ["dense", "sparse"]},
            "vision_config": {"sam_config": {"downsample_channels": [64, 64]}},
        }
    ),
    "diffusion_gemma": Family(
        cls="DiffusionGemmaEncoderTextModel",
        config={"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    ),
    "gemma4_unified": Family(cls="Gemma4UnifiedForCausalLM"),
    "dots3_note": Family(drop=("input_features",)),
    "neomme": Family(given={"pixel_values": noise(8, 192)}),
    "glm_image": Family(drop=("pixel_values", "image_grid_thw")),
    "granite_docling": Family(drop=("pixel_values",)),
    "inkling2": Family(
        given={"pixel_values": noise(8, 16, 16, 3), "image_grid_thw": torch.tensor([[1, 2, 2]] * 2)}
    ),
    "inkling": Family(drop=("pixel_values",)),
}
