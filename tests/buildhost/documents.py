"""Bundle directories with a true document and stand-in files, and adapters with no base behind
them: what converting, publishing and inspecting need when no graph is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from remora_contract.bundle import (
    BUNDLE_JSON,
    FORMAT_VERSION,
    GRAPH_FILE,
    Bundle,
    BundleFile,
    GraphSpec,
    QuantSpec,
    SourceInfo,
)
from remora_contract.decoder import DecoderSpec, RopeSpec
from remora_contract.digests import canonical_json, digest_bytes

BASE_DIGEST = digest_bytes(b"a base model")


def decoder_spec(checkpoint: Path | None = None, **changes: Any) -> DecoderSpec:
    """Of a Hugging Face checkpoint directory, or a small one of its own."""
    config = json.loads((checkpoint / "config.json").read_text()) if checkpoint else {}
    heads = config.get("num_attention_heads", 4)
    hidden = config.get("hidden_size", 32)
    fields: dict[str, Any] = {
        "family": config.get("model_type", "qwen3"),
        "layers": config.get("num_hidden_layers", 2),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads", 2),
        "head_dim": config.get("head_dim") or hidden // heads,
        "intermediate": config.get("intermediate_size", 48),
        "vocab": config.get("vocab_size", 64),
        "norm_eps": 1e-5,
        "rope": RopeSpec(10000.0),
    }
    return DecoderSpec(**(fields | changes))


def write_bundle(
    directory: Path,
    decoder: DecoderSpec,
    *,
    files: dict[str, bytes] | None = None,
    max_bank_rank: int = 64,
    dtype: Any = "float32",
    quant: QuantSpec | None = None,
) -> Bundle:
    """A bundle directory whose document tells the truth about its (stand-in) files."""
    contents = {GRAPH_FILE: b"no graph", f"{GRAPH_FILE}.data": b"weights"} | (files or {})
    for name, data in contents.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    bundle = Bundle(
        format_version=FORMAT_VERSION,
        base_digest=BASE_DIGEST,
        decoder=decoder,
        graph=GraphSpec("native", dtype, 128, max_bank_rank, 24, quant or QuantSpec()),
        files=tuple(BundleFile(n, len(d), digest_bytes(d)) for n, d in sorted(contents.items())),
        eos_token_ids=(1,),
        bos_token_id=None,
        pad_token_id=None,
        source=SourceInfo("a model", decoder.family, "float32"),
        exporter="tests",
    )
    (directory / BUNDLE_JSON).write_bytes(canonical_json(bundle))
    return bundle


def plain_config(**changes: Any) -> dict[str, Any]:
    """An adapter_config.json as PEFT writes it, q_proj and v_proj at rank 2."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "somewhere/base",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "use_rslora": False,
    }
    return config | changes


def peft_tensors(
    decoder: DecoderSpec, *, projections: str = "qv", rank: int = 2
) -> dict[str, np.ndarray]:
    """Tensors as PEFT names and orients them, for q and/or v of every layer."""
    rng = np.random.default_rng(0)
    shapes = {
        p: (decoder.in_features(p), decoder.out_features(p))
        for p in projections  # type: ignore
    }
    tensors = {}
    for layer in range(decoder.layers):
        for p, (k, n) in shapes.items():
            stem = f"base_model.model.model.layers.{layer}.self_attn.{p}_proj"
            tensors[f"{stem}.lora_A.weight"] = rng.standard_normal((rank, k)).astype(np.float32)
            tensors[f"{stem}.lora_B.weight"] = rng.standard_normal((n, rank)).astype(np.float32)
    return tensors


def write_peft(directory: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory
