"""Adapters in every format for the small base of `documents`, and the reference readers of the
foreign ones: plain code that decodes what the other runtime documents, sharing none of ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from remora_build.adapters.formats.carried import Carried
from remora_build.adapters.formats.registry import ForeignFormat
from remora_build.adapters.sidecar import Factor
from remora_contract.decoder import DecoderSpec
from remora_contract.targets import PROJECTIONS, AdapterTarget, Projection

# TensorRT-LLM's module ids as its documentation lists them, and the projection each one adapts.
DOCUMENTED_IDS: dict[int, str] = {
    0: "attn_qkv",
    1: "attn_q",
    2: "attn_k",
    3: "attn_v",
    4: "attn_dense",
    5: "mlp_h_to_4h",
    6: "mlp_4h_to_h",
    7: "mlp_gate",
    8: "cross_attn_qkv",
    9: "cross_attn_q",
    10: "cross_attn_k",
    11: "cross_attn_v",
    12: "cross_attn_dense",
    13: "moe_h_to_4h",
    14: "moe_4h_to_h",
    15: "moe_gate",
    16: "moe_router",
    17: "mlp_router",
    18: "mlp_gate_up",
}
PROJECTION_OF_ID: dict[int, Projection] = {
    1: "q",
    2: "k",
    3: "v",
    4: "o",
    5: "gate",
    6: "down",
    7: "up",
}

FOREIGN: tuple[ForeignFormat, ...] = ("edgellm", "trtllm")

Pairs = dict[AdapterTarget, tuple[np.ndarray, np.ndarray]]


def random_factors(
    decoder: DecoderSpec,
    *,
    seed: int = 0,
    rank: int = 2,
    projections: tuple[Projection, ...] = PROJECTIONS,
    scaling: float = 2.0,
) -> dict[AdapterTarget, Factor]:
    """Exact in float16 and bfloat16 alike: small multiples of 1/8."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return (rng.integers(-16, 17, shape) / 8).astype(np.float32)

    return {
        AdapterTarget(layer, p): Factor(
            draw(decoder.in_features(p), rank), draw(rank, decoder.out_features(p)), scaling
        )
        for layer in range(decoder.layers)
        for p in projections
    }


def carried(decoder: DecoderSpec, **options: Any) -> Carried:
    return Carried(random_factors(decoder, **options), {"peft_type": "LORA", "r": 2})


def pairs(factors: Mapping[AdapterTarget, Factor]) -> Pairs:
    return {target: (f.a, f.b) for target, f in factors.items()}


def assert_same_factors(
    have: Mapping[AdapterTarget, Factor], need: Mapping[AdapterTarget, Factor]
) -> None:
    assert set(have) == set(need)
    for target, (a, b) in pairs(need).items():
        assert np.array_equal(have[target].a, a), target
        assert np.array_equal(have[target].b, b), target


def decode_lora_weights(
    weights: np.ndarray, config: np.ndarray, decoder: DecoderSpec
) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    """(module id, layer) -> (in [r, k], out [n, r]) of float arrays [1, rows, width] and
    [1, rows, 3]: a row is in, flattened, then out, flattened, then zeros."""
    decoded = {}
    for row, line in zip(weights[0], config[0], strict=True):
        module, layer, rank = (int(x) for x in line[:3])
        projection = PROJECTION_OF_ID[module]
        k, n = decoder.in_features(projection), decoder.out_features(projection)
        assert not row[rank * (k + n) :].any()
        in_ = row[: rank * k].reshape(rank, k)
        out = row[rank * k : rank * (k + n)].reshape(n, rank)
        decoded[module, layer] = (in_, out)
    return decoded


def save_pair(directory: Path, weights: np.ndarray, config: Any, suffix: str = "") -> Path:
    """`weights` [rows, width] and `config` [rows, 3 or 4] as numpy itself saves them."""
    directory.mkdir(parents=True, exist_ok=True)
    np.save(directory / f"model.lora_weights{suffix}.npy", weights[None])
    np.save(directory / f"model.lora_config{suffix}.npy", np.array(config, np.int32)[None])
    return directory


def rewritten(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON document, as a hand would."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
