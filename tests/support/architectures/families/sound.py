"""Models of sound and speech."""

from __future__ import annotations

import torch

from tests.support.architectures.family import Family
from tests.support.architectures.inputs import noise, special, token_ids

CODES = {"decoder_input_ids": token_ids(20).view(8, 5)}
GROUPS = {"upsample_groups": 64}
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
            "parakeet",
        )
    },
    "nemotron3_5_transcribe": Family(
        given=MEL, config={"text_config": {"n_groups": 2, "mamba_num_heads": 8, "mamba_head_dim": 16}}
    ),
    **{
        name: Family(
            given={"input_values": noise(2, 1, 1600), "input_features": noise(2, 5, 64)},
            config={"quantization_dim": 128, "semantic_model_config": {"feature_projection_input_dim": 64}},
        )
        for name in ("neucodec", "xcodec2")
    },
    "nemotron_asr_streaming": Family(
        cls="NemotronAsrStreamingEncoder",
        given=MEL,
        impossible="its own eager attention gives nan: some rows of its chunks have no key",
    ),
    "speech_to_text": Family(
        given={"input_features": noise(2, 64, 16)}, config={"input_feat_per_channel": 16}
    ),
    "wav2vec2_bert": Family(given=MEL, config={"feature_projection_input_dim": 16}),
    "seamless_m4t": Family(cls="SeamlessM4TForTextToText"),
    "seamless_m4t_v2": Family(cls="SeamlessM4Tv2ForTextToText"),
    "mimi": Family(cls="MimiModel", given={"input_values": noise(2, 1, 1600)}, config=GROUPS),
    "csm": Family(drop=("input_values",), config={"codec_config": GROUPS}),
    "kyutai_speech_to_text": Family(
        drop=("input_values",),
        given={"input_ids": token_ids(429).view(2, 13, 33)},
        config={"codec_config": GROUPS},
    ),
    "moshi": Family(cls="MoshiForCausalLM", config={"audio_encoder_config": GROUPS}),
    "clap": Family(
        given={"input_features": noise(2, 1, 128, 32)},
        config={
            "audio_config": {
                "spec_size": 64,
                "num_mel_bins": 32,
                "window_size": 2,
                "patch_embeds_hidden_size": 64,
                "hidden_size": 512,
            }
        },
    ),
    "dia": Family(given={"decoder_input_ids": token_ids(45).view(2, 5, 9)}),
    "fun_asr_nano": Family(
        given={"input_features": noise(2, 16, 112)}, config={"adaptor_config": {"intermediate_size": 16}}
    ),
    "glmasr": Family(config={"audio_config": {"intermediate_size": 256}}),
    "voxtral": Family(
        config={"audio_token_id": special("audio_token_id"), "audio_config": {"intermediate_size": 256}}
    ),
    "moonshine_streaming": Family(config={"num_key_value_heads": 4}),
    "musicgen": Family(given=CODES),
    "musicgen_melody": Family(given=CODES),
    "qwen3_asr": Family(
        given={
            "input_features": noise(2, 16, 100),
            "input_features_mask": torch.ones(2, 100, dtype=torch.long),
        }
    ),
    "voxtral_realtime": Family(given={"input_ids": token_ids(8)}),
    "pocket_tts_audio_tokenizer": Family(given={"input_values": noise(2, 1, 1600)}),
    "pe_audio": Family(given={"input_values": noise(2, 1, 9600)}),
}
