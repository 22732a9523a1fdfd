"""Models of time series."""

from __future__ import annotations

import torch

from tests.support.architectures.family import Family
from tests.support.architectures.inputs import noise

SERIES = {
    "past_values": noise(2, 15).abs(),
    "past_time_features": noise(2, 15, 1),
    "past_observed_mask": torch.ones(2, 15),
    "future_values": noise(2, 4).abs(),
    "future_time_features": noise(2, 4, 1),
}
SIZES = {"prediction_length": 4, "context_length": 8, "num_time_features": 1, "lags_sequence": [1, 2, 7]}

FAMILIES: dict[str, Family] = {
    "time_series_transformer": Family(given=SERIES, config=SIZES),
    "informer": Family(given=SERIES, config=SIZES),
    "patchtst": Family(given={"past_values": noise(2, 32, 1)}),
    "patchtsmixer": Family(given={"past_values": noise(2, 32, 1)}, config={"self_attn": True}),
    "timesfm": Family(
        given={
            "past_values": noise(2, 128),
            "past_values_padding": torch.zeros(2, 128, dtype=torch.long),
            "freq": torch.zeros(2, 1, dtype=torch.long),
        }
    ),
    "timesfm2_5": Family(
        given={"past_values": noise(2, 128), "past_values_padding": torch.zeros(2, 128, dtype=torch.long)}
    ),
}
