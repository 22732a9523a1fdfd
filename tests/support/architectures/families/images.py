"""Models of images and of video."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import transformers as tf

from tests.support.architectures.family import Family
from tests.support.architectures.inputs import noise

RESNET = {
    "_class": tf.ResNetConfig, "depths": [1, 1, 1, 1], "hidden_sizes": [16, 16, 32, 64], "embedding_size": 16,
    "layer_type": "basic", "out_features": ["stage4"],
}  # fmt: skip
HIERA = {
    "backbone_config": {
        "image_size": [64, 64],
        "hidden_size": 16,
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [16, 32, 64, 128],
        "num_attention_heads_per_stage": [1, 2, 4, 4],
        "window_size_per_stage": [8, 4, 4, 2],
        "global_attention_blocks": [3],
    },
    "backbone_channel_list": [128, 64, 32, 16],
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
}
TIMM = "its image backbone needs the package timm"
LINE = {"pixel_values": noise(2, 3, 96, 192)}
VIDEO = {"pixel_values": noise(2, 2, 3, 32, 32)}
CLIP = {"pixel_values_videos": noise(2, 2, 3, 32, 32)}


def video_session(folder: str, prefix: str) -> Any:
    """Return a session of a video model: three frames, and one point of the first."""
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    session = getattr(module, f"{prefix}InferenceSession")(
        video=noise(3, 3, 64, 64), video_height=64, video_width=64, dtype=torch.float32
    )
    session.obj_id_to_idx(1)
    points = {
        "point_coords": torch.tensor([[[[20.0, 30.0]]]]),
        "point_labels": torch.ones(1, 1, 1, dtype=torch.int),
    }
    session.add_point_inputs(0, 0, points)
    session.obj_with_new_inputs = [1]
    return session


FAMILIES: dict[str, Family] = {
    "swin": Family(
        config={
            "embed_dim": 32,
            "num_heads": [2, 2, 4, 4],
            "window_size": 2,
            "patch_size": 2,
            "depths": [2, 2, 2, 2],
        }
    ),
    "detr": Family(config={"backbone_config": RESNET}),
    "conditional_detr": Family(config={"backbone_config": RESNET}),
    "deformable_detr": Family(
        config={
            "backbone_config": {**RESNET, "out_features": ["stage2", "stage3", "stage4"]},
            "num_feature_levels": 3,
        }
    ),
    "vivit": Family(given=VIDEO, config={"num_frames": 2, "tubelet_size": [2, 8, 8]}),
    "videomae": Family(given=VIDEO, config={"num_frames": 2}),
    "vjepa2": Family(given=CLIP, config={"frames_per_clip": 2, "crop_size": 32}),
    "videomt": Family(given=CLIP),
    "videoprism": Family(
        cls="VideoPrismVideoModel", given=CLIP, config={"num_frames": 2, "tubelet_size": [1, 8, 8]}
    ),
    "x_clip": Family(given=VIDEO, config={"vision_config": {"num_frames": 2}}),
    "vitpose_backbone": Family(cls="VitPoseBackbone", config={"image_size": [32, 32], "patch_size": [8, 8]}),
    "owlvit": Family(config={"text_config": {"max_position_embeddings": 32}}),
    "owlv2": Family(config={"text_config": {"max_position_embeddings": 32}}),
    "align": Family(config={"vision_config": {"width_coefficient": 1.0, "depth_coefficient": 0.3}}),
    "eomt": Family(config={"num_blocks": 1}),
    "eomt_dinov3": Family(config={"num_blocks": 1}),
    "rf_detr": Family(config={"backbone_config": {"out_indices": [1, 2], "num_windows": 1}}),
    "lw_detr": Family(
        config={
            "projector_scale_factors": [1.0],
            "backbone_config": {"out_indices": [1, 2], "num_windows": 4},
        }
    ),
    "sam": Family(
        config={"vision_config": {"num_pos_feats": 32, "global_attn_indexes": [1], "window_size": 2}}
    ),
    "sam_hq": Family(
        config={"vision_config": {"num_pos_feats": 32, "global_attn_indexes": [1], "window_size": 2}}
    ),
    "sapiens2": Family(config={"num_key_value_heads_per_layer": [4, 2]}),
    "pp_ocrv5_server_rec": Family(
        cls="PPOCRV5ServerRecForTextRecognition", given={"pixel_values": noise(2, 3, 48, 96)}
    ),
    "pp_ocrv5_mobile_rec": Family(cls="PPOCRV5MobileRecForTextRecognition", given=LINE),
    "pp_ocrv6_small_rec": Family(
        cls="PPOCRV6SmallRecForTextRecognition",
        given={"pixel_values": noise(2, 3, 32, 96)},
        config={"backbone_config": {"stem_channels": [3, 48, 96]}},
    ),
    "lightglue": Family(
        given={"pixel_values": noise(2, 2, 3, 64, 64)},
        config={"keypoint_detector_config": {"keypoint_decoder_dim": 65}},
    ),
    "efficientloftr": Family(
        cls="EfficientLoFTRModel",
        given={"pixel_values": noise(2, 2, 3, 64, 64)},
        config={
            "hidden_size": 64,
            "num_attention_heads": 8,
            "out_features": [16, 32, 64],
            "stage_num_blocks": [1, 1, 1],
            "stage_stride": [2, 2, 2],
        },
    ),
    "siglip2": Family(
        given={
            "pixel_values": noise(2, 16, 192),
            "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
        },
        config={"vision_config": {"num_patches": 16}},
    ),
    "sam2": Family(
        given={"pixel_values": noise(2, 3, 64, 64)},
        config={"vision_config": HIERA, "prompt_encoder_config": {"image_size": 64, "patch_size": 16}},
    ),
    "sam3_tracker": Family(config={"vision_config": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}}),
    "sam2_video": Family(
        given={"inference_session": lambda: video_session("sam2_video", "Sam2Video"), "frame_idx": 0},
        config={"vision_config": HIERA, "prompt_encoder_config": {"image_size": 64, "patch_size": 16}},
    ),
    "sam3_tracker_video": Family(
        impossible="runs in sessions over a video, which this sweep has no small one for"
    ),
    "edgetam": Family(impossible=TIMM),
    "edgetam_video": Family(impossible=TIMM),
    "pe_video": Family(impossible=TIMM),
    "pe_audio_video": Family(impossible=TIMM),
}
