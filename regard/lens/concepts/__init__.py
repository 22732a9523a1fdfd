"""Concepts of hidden states: dictionaries, the words they stand for, and how fine-tuning moves them."""

from regard.lens.concepts.dictionary import Concepts, fit_concepts
from regard.lens.concepts.features import Features, collect_features
from regard.lens.concepts.grounding import nearest_samples, overlap, recovered_words, shift_words, words_of
from regard.lens.concepts.moved import Shift, analyse_shift
from regard.lens.concepts.official import read_official_features

__all__ = [
    "Concepts",
    "Features",
    "Shift",
    "analyse_shift",
    "collect_features",
    "fit_concepts",
    "nearest_samples",
    "overlap",
    "read_official_features",
    "recovered_words",
    "shift_words",
    "words_of",
]
