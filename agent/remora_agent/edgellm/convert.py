"""An adapter of ours as TensorRT Edge-LLM reads it: A [k, r] and B [r, n] in float16, scaling in B.

What Edge-LLM has no place for is refused by name. `remora-build adapter --format edgellm` writes
the same names; the agent needs the tensors alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from remora_agent.bank.weights import load_weights
from remora_contract.adapter import load_adapter
from remora_contract.bundle import Bundle
from remora_contract.errors import AdapterInvalid, Unsupported
from remora_contract.targets import AdapterTarget

_ATTENTION = ("q", "k", "v", "o")
_MLP = ("gate", "up", "down")


def refuse_adapter(name: str, directory: Path) -> None:
    """Raises Unsupported for an adapter that acts otherwise than always and everywhere."""
    adapter = load_adapter(directory)
    if adapter.invocation_tokens:
        raise Unsupported(
            f"adapter {name}: backend edgellm does not wait for invocation tokens; use another "
            "backend"
        )
    for t in adapter.targets:
        if t.dora or t.bias or t.projection not in _ATTENTION + _MLP:
            what = "DoRA" if t.dora else "a bias" if t.bias else t.projection
            raise Unsupported(
                f"adapter {name}: backend edgellm has no place for {what} ({t.target.name()})"
            )


def write_adapter(directory: Path, bundle: Bundle, out: Path) -> Path:
    """Writes the file that the runtime's lora_weights_map names, and returns it. Raises as
    `load_weights`, and AdapterInvalid where float16 overflows."""
    tensors = {}
    for target, factors in load_weights(directory, bundle).tensors.items():
        for part, values in zip("AB", factors, strict=True):
            name = tensor_name(target, part)
            with np.errstate(over="ignore"):
                tensors[name] = np.ascontiguousarray(values, np.float16)
            if not np.isfinite(tensors[name]).all():
                raise AdapterInvalid(
                    f"{directory}: {name} does not fit float16, and Edge-LLM reads no other type"
                )
    header, offset = {}, 0
    for name in sorted(tensors):
        end = offset + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    start = json.dumps(header, separators=(",", ":")).encode()
    start += b" " * (-len(start) % 8)
    with out.open("wb") as f:
        f.write(len(start).to_bytes(8, "little") + start)
        for name in sorted(tensors):
            f.write(tensors[name].tobytes())
    return out


def tensor_name(target: AdapterTarget, part: str) -> str:
    """`part` is A or B."""
    block = "self_attn" if target.projection in _ATTENTION else "mlp"
    return f"model.layers.{target.layer}.{block}.{target.projection}_proj.lora_{part}.weight"
