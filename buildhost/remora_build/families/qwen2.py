"""Qwen2 and Qwen2.5: q, k and v always have biases, o and the MLP never, no q/k norm."""

from __future__ import annotations

from remora_build.families.decoder import Biases, read_decoder
from remora_build.families.family import Family
from remora_build.families.fields import ConfigFields
from remora_contract.bundle import DecoderSpec


def read(fields: ConfigFields) -> DecoderSpec:
    return read_decoder(fields, FAMILY.model_type, biases=Biases(qkv=True), qk_norm="none")


FAMILY = Family("qwen2", "Qwen2, Qwen2.5; DeepSeek-R1 distills", "q, k, v biases", read)
