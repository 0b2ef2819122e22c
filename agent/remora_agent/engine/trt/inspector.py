"""`python -m remora_agent.engine.trt.inspector BACKEND PLAN`: an engine's layers after fusion.

In a process of its own, as deserialising is native code: whatever happens here, whoever asked goes
on. Asked for once an engine is in the cache, so that it costs no build of a device that serves its
memory or its time.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remora_agent.engine.trt.module import TRT_BACKENDS, TrtModule, load_module

AT_LOAD = (
    "counted before fusion only, as TensorRT for RTX compiles kernels when an engine is loaded"
)
_SECONDS = 120
_MAX_KINDS = 64  # that a report names; the rest is summed
_MAX_ERROR = 300
_PRECISION = re.compile(r"\b(FP32|FP16|BF16|FP8|FP4|INT8|INT4|INT32|INT64|BOOL|FLOAT|HALF)\b")
_SPELLED = {"FLOAT": "FP32", "HALF": "FP16"}


@dataclass(frozen=True)
class Fused:
    """An engine's layers after fusion, kind and precision -> how many; or why they are not told."""

    layers: Mapping[str, int] = field(default_factory=dict)
    not_told: str = ""


def fused_layers(module: TrtModule, plan: Path) -> Fused:
    """Of the engine at `plan`. Never raises for what the engine or its inspector does."""
    if module.api.portable:
        return Fused(not_told=AT_LOAD)
    command = [sys.executable, "-m", __name__, module.backend, str(plan)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, ValueError, subprocess.TimeoutExpired) as e:
        return Fused(not_told=str(e)[:_MAX_ERROR])
    if ended.returncode < 0:
        return Fused(not_told=f"the inspection ended by signal {-ended.returncode}")
    told = (ended.stderr if ended.returncode else ended.stdout).strip().splitlines()
    if ended.returncode or not told:
        why = told[-1] if told else "the inspection says nothing"
        return Fused(not_told=why[:_MAX_ERROR])
    return Fused(json.loads(told[-1]))  # TensorRT's own lines, if any, come first


def engine_layers(trt: Any, plan: bytes) -> list[Any]:
    """As the inspector names them: objects, or names alone. Raises ValueError."""
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise ValueError("the engine cannot be deserialised on this machine")
    inspector = engine.create_engine_inspector()
    said = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    layers = said.get("Layers") if isinstance(said, dict) else None
    if not isinstance(layers, list):
        raise ValueError("the inspector's answer has no list of layers")
    return layers


def counted(layers: list[Any]) -> dict[str, int]:
    """Kind and precision -> how many; of bounded size."""
    kinds = Counter(_kind(layer) for layer in layers).most_common()
    told = dict(kinds[:_MAX_KINDS])
    if rest := sum(count for _, count in kinds[_MAX_KINDS:]):
        told["of other kinds"] = rest
    return told


def _kind(layer: Any) -> str:
    if not isinstance(layer, dict) or "LayerType" not in layer:
        return "named only"
    outputs = layer.get("Outputs")
    first = outputs[0] if isinstance(outputs, list) and outputs else {}
    form = str(first.get("Format/Datatype", "")) if isinstance(first, dict) else ""
    found = _PRECISION.search(form.upper())
    kind = str(layer["LayerType"])[:64]
    return f"{kind} {_SPELLED.get(found[1], found[1])}" if found else kind


def main() -> int:
    name, plan = sys.argv[1:]
    module = load_module(next(b for b in TRT_BACKENDS if b == name))
    try:
        layers = engine_layers(module.trt, Path(plan).read_bytes())
    except (ValueError, OSError, RuntimeError) as e:
        sys.stderr.write(f"{e}\n")
        return 1
    sys.stdout.write(json.dumps(counted(layers)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
