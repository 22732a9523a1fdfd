"""What single architectures need beyond the general rules, by name of the modeling file."""

from tests.support.architectures.family import Family

FAMILIES: dict[str, Family] = {}
