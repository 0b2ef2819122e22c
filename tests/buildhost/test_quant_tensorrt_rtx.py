"""Quantized graphs with a bank pass a real TensorRT parser and builder, ahead of time, for the
processors whose numbers they need, and fail for the others as the contract says.

Needs the wheel `tensorrt-rtx`; builds in child processes, as test_tensorrt_rtx does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import onnx
import pytest

from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_contract.bundle import GRAPH_FILE
from remora_contract.quant import least_compute_capability
from remora_contract.targets import ALL_GROUPS, PARTS
from tests.support.checkpoints import make_checkpoint
from tests.support.quantized import quantize_checkpoint

pytestmark = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None,
    reason="tensorrt-rtx is not installed: pip install tensorrt-rtx (or remora[tensorrt])",
)

CHILD = Path(__file__).with_name("tensorrt_rtx_child.py")
TIMEOUT_S = 180
RANK, CONTEXT = 16, 64
# One of each form of the graph: a layout to read, or a kind to make.
READ = (
    "modelopt-nvfp4",
    "modelopt-nvfp4-awq",
    "modelopt-mxfp8",
    "modelopt-fp8",
    "fp8",
    "modelopt-int4-awq",
    "modelopt-smoothquant",
    "ct-int8",
    "autoawq",
)
MADE = ("nvfp4", "mxfp8", "int8")
SMOKE = ("modelopt-nvfp4", "autoawq")
PROCESSORS = {86: "SM86", 89: "SM89", 100: "SM120"}  # least capability -> what the wheel can name


def build(path: Path, processor: str) -> dict:
    """What the child reports after parsing and building one profile."""
    graph = onnx.load(str(path), load_external_data=False).graph
    request = {"graph": str(path), "processors": [processor], "profiles": [profile(graph)]}
    child = subprocess.run(
        [sys.executable, str(CHILD)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return json.loads(child.stdout.splitlines()[-1])


def profile(graph: onnx.GraphProto) -> dict[str, list[tuple[int, ...]]]:
    sizes = {"b": (1, 1, 4), "s": (1, 1, CONTEXT)}
    sizes |= {f"t_{group}": (0, 16, RANK * len(PARTS[group])) for group in ALL_GROUPS}
    shapes = {}
    for value in graph.input:
        dims = value.type.tensor_type.shape.dim
        ranges = [sizes[d.dim_param] if d.dim_param else (d.dim_value,) * 3 for d in dims]
        shapes[value.name] = list(zip(*ranges, strict=True))
    return shapes


def check_builds(tmp_path: Path, name: str) -> None:
    source = make_checkpoint(tmp_path / "source", "qwen2", hidden=128, intermediate=256, seed=5)
    options = {"max_context": CONTEXT, "max_bank_rank": RANK, "golden": False}
    if name in MADE:
        bundle = export_checkpoint(
            source, tmp_path / "bundle", ExportOptions(quant=name, **options)
        )
    else:
        made = quantize_checkpoint(source, tmp_path / "quantized", name)
        chosen = ExportOptions(own_adapters=True, **options)
        bundle = export_checkpoint(made.directory, tmp_path / "bundle", chosen)
    least = least_compute_capability(bundle.graph.quant) or 86
    path = tmp_path / "bundle" / GRAPH_FILE
    report = build(path, PROCESSORS[least])
    assert report["errors"] == []
    assert report["engine_bytes"] > 0
    bank = [i for i in report["inputs"] if i.startswith(("lora_a.", "lora_b."))]
    assert len(bank) == 2 * 4 * bundle.decoder.layers
    for below, processor in PROCESSORS.items():
        if below < least:
            report = build(path, processor)
            assert report["engine_bytes"] == 0
            assert "HW-specific datatypes" in report["errors"][0]


@pytest.mark.parametrize("name", SMOKE)
def test_tensorrt_builds_a_quantized_graph_with_its_bank(tmp_path: Path, name: str) -> None:
    check_builds(tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in (*READ, *MADE) if n not in SMOKE])
def test_tensorrt_builds_every_form_of_quantized_graph(tmp_path: Path, name: str) -> None:
    check_builds(tmp_path, name)
