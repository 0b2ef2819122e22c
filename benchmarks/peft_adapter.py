"""A rank-16 PEFT adapter on all projections of one of export's shapes, as PEFT saves it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from export import Shape
from safetensors.numpy import save_file

from remora_build.families import naming, read_config
from remora_contract.decoder import DecoderSpec
from remora_contract.targets import MODEL_GROUPS

RANK, ALPHA = 16, 32


def decoder_of(shape: Shape) -> DecoderSpec:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(shape.config))
        return read_config(Path(directory))


def make_adapter(directory: Path, shape: Shape) -> None:
    """Random factors in float32."""
    decoder, random, tensors, targets = decoder_of(shape), np.random.default_rng(0), {}, set()
    for module, parts in naming(decoder).modules().items():
        if parts[0].target.projection in MODEL_GROUPS:
            continue
        targets.add(module.rpartition(".")[2])
        outputs = max(part.end for part in parts)
        inputs = decoder.in_features(parts[0].target.projection)
        for part, size in (("A", (RANK, inputs)), ("B", (outputs, RANK))):
            values = random.standard_normal(size, np.float32) * np.float32(0.02)
            tensors[f"base_model.model.{module}.lora_{part}.weight"] = values
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": shape.title,
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": sorted(targets),
        "bias": "none",
    }
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
