"""What single architectures need beyond the general rules, by name of the modeling file."""

from tests.support.architectures.families import images, sound, text, text_with_images, time_series
from tests.support.architectures.family import Family

FAMILIES: dict[str, Family] = {
    **text.FAMILIES,
    **images.FAMILIES,
    **text_with_images.FAMILIES,
    **sound.FAMILIES,
    **time_series.FAMILIES,
}
