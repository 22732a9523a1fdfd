"""Models of sound and speech."""

from __future__ import annotations

from tests.support.architectures.family import Family
from tests.support.architectures.inputs import noise

MEL = {"input_features": noise(2, 64, 16)}

FAMILIES: dict[str, Family] = {
    "audio_spectrogram_transformer": Family(
        given={"input_values": noise(2, 32, 16)},
        config={"max_length": 32, "frequency_stride": 4, "time_stride": 4},
    ),
    **{
        name: Family(given=MEL)
        for name in (
            "canary",
            "cohere_asr",
            "lasr",
            "nemotron3_5_transcribe",
            "nemotron3_diarization",
            "nemotron_asr_streaming",
            "parakeet",
        )
    },
    "speech_to_text": Family(
        given={"input_features": noise(2, 64, 16)}, config={"input_feat_per_channel": 16}
    ),
    "wav2vec2_bert": Family(given=MEL, config={"feature_projection_input_dim": 16}),
    "seamless_m4t": Family(cls="SeamlessM4TForTextToText"),
    "seamless_m4t_v2": Family(cls="SeamlessM4Tv2ForTextToText"),
    "mimi": Family(cls="MimiModel", given={"input_values": noise(2, 1, 1600)}),
    "pocket_tts_audio_tokenizer": Family(given={"input_values": noise(2, 1, 1600)}),
    "pe_audio": Family(given={"input_values": noise(2, 1, 1600)}),
}
