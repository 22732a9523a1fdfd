"""Models of images and of video."""

from __future__ import annotations

import transformers as tf

from tests.support.architectures.family import Family
from tests.support.architectures.inputs import noise

RESNET = {
    "_class": tf.ResNetConfig, "depths": [1, 1, 1, 1], "hidden_sizes": [16, 16, 32, 64], "embedding_size": 16,
    "layer_type": "basic", "out_features": ["stage4"],
}  # fmt: skip
VIDEO = {"pixel_values": noise(2, 2, 3, 32, 32)}
CLIP = {"pixel_values_videos": noise(2, 2, 3, 32, 32)}

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
    "videoprism": Family(cls="VideoPrismVideoModel", given=CLIP),
    "x_clip": Family(given=VIDEO, config={"vision_config": {"num_frames": 2}}),
    "vitpose_backbone": Family(cls="VitPoseBackbone", config={"image_size": [32, 32], "patch_size": [8, 8]}),
    "owlvit": Family(config={"text_config": {"max_position_embeddings": 16}}),
    "owlv2": Family(config={"text_config": {"max_position_embeddings": 16}}),
    "align": Family(),
    "eomt": Family(),
}
