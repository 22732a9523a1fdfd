"""Language models that also read images."""

from __future__ import annotations

import torch

from tests.support.architectures.family import Family
from tests.support.architectures.inputs import noise, token_ids

ONE_IMAGE = {"pixel_values": noise(2, 1, 3, 32, 32)}
QUESTION = {"qformer_input_ids": token_ids(6)}

FAMILIES: dict[str, Family] = {
    "idefics": Family(given={**ONE_IMAGE, "image_attention_mask": torch.ones(2, 13, 1, dtype=torch.long)}),
    "idefics2": Family(given=ONE_IMAGE),
    "idefics3": Family(given=ONE_IMAGE),
    "smolvlm": Family(given=ONE_IMAGE),
    "instructblip": Family(given=QUESTION),
    "instructblipvideo": Family(given={**QUESTION, "pixel_values": noise(2, 2, 3, 32, 32)}),
    "aria": Family(config={"projector_patch_to_query_dict": {16: 4}}),
    "gemma3": Family(config={"mm_tokens_per_image": 4}),
    "t5gemma2": Family(),
}
