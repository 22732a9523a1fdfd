"""VAN, the visual attention network: large-kernel attention in four stages, for images.

Importing this registers `VANConfig` with the Auto classes, and the models by name.
"""

from regard.models.van.config import VANConfig
from regard.models.van.names import official_names
from regard.models.van.van import VANForImageClassification

__all__ = ["VANConfig", "VANForImageClassification", "official_names"]
