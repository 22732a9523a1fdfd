"""MobileNet-V1 and -V2, plain and with subspace attention in the place of layers or after them.

Importing this registers both configs with the Auto classes, and the models by name.
"""

from regard.models.mobilenet.config import MobileNetV1Config, MobileNetV2Config
from regard.models.mobilenet.insert import Inserted, insert_ulsam
from regard.models.mobilenet.v1 import MobileNetV1ForImageClassification
from regard.models.mobilenet.v2 import MobileNetV2ForImageClassification, official_names

__all__ = [
    "Inserted", "MobileNetV1Config", "MobileNetV1ForImageClassification", "MobileNetV2Config",
    "MobileNetV2ForImageClassification", "insert_ulsam", "official_names",
]  # fmt: skip
