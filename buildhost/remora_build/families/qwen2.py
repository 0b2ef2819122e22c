"""Qwen2 and Qwen2.5: q, k and v always have biases, o and the MLP never, no q/k norm."""

from __future__ import annotations

from remora_build.families.decoder import Biases, read_decoder
from remora_build.families.fields import ConfigFields
from remora_contract.bundle import DecoderSpec

MODEL_TYPE = "qwen2"


def read(fields: ConfigFields) -> DecoderSpec:
    return read_decoder(fields, MODEL_TYPE, biases=Biases(qkv=True), qk_norm="none")
