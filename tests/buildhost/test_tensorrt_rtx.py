"""Both dialects of every family pass a real TensorRT parser and builder, without a GPU.

Needs the wheel `tensorrt-rtx`. Every build runs in a child process: a graph can take the parser or
the builder down. One build is for all processors; a few are in `make test`, the rest are slow.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import onnx
import pytest

from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_build.families import FAMILIES
from remora_contract.bundle import GRAPH_FILE
from remora_contract.targets import ALL_GROUPS, PARTS
from tests.support.checkpoints import LLAMA3_SCALING, make_checkpoint

pytestmark = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None,
    reason="tensorrt-rtx is not installed: pip install tensorrt-rtx (or remora[tensorrt])",
)

CHILD = Path(__file__).with_name("tensorrt_rtx_child.py")
# Orin is SM87, which the wheel cannot name; SM86 is nearest.
PROCESSORS = ("SM80", "SM86", "SM89", "SM120")
TIMEOUT_S = 180
EXPECTED_WARNINGS = (
    # Said about every int64 input, which is what the contract asks for.
    "has Int64 binding",
    # Said about the experts' Loop, whose condition is always true. Without one the builder crashes.
    "both a trip limit and a loop termination condition",
)
CONTEXT, RANK = 64, 32
DIALECTS = ("native", "legacy")

Shape = tuple[int, ...]
Build = tuple[str, str, dict[str, Any], dict[str, Any]]  # family, dialect, checkpoint, export

BANK = {"max_bank_rank": RANK}
NO_BANK = {"max_bank_rank": 0}
INT4 = {"int4_block": 32, **BANK}
ADAPT_ALL = {"adapt": ("embed", "head", "experts"), "dora": True, "adapter_bias": True}
# Widths of which every matrix is a multiple of 128.
WIDE = {"hidden": 128, "intermediate": 256, "head_dim": 32}

FORMS: dict[str, dict[str, Any]] = {"fp16": BANK, "int4-32": INT4}
BUILDS: dict[str, Build] = {
    f"{family}-{dialect}-{form}": (family, dialect, {}, FORMS[form])
    for family, dialect, form in product(FAMILIES, DIALECTS, FORMS)
}
# What is the same in every family, once a dialect.
for _dialect in DIALECTS:
    _more: dict[str, Build] = {
        "no-bank": ("qwen3", _dialect, {}, NO_BANK),
        "int4-no-bank": ("qwen3", _dialect, {}, INT4 | NO_BANK),
        "scaled": ("llama", _dialect, {"rope_scaling": LLAMA3_SCALING}, BANK),
        "biased": ("llama", _dialect, {"attention_bias": True, "mlp_bias": True}, BANK),
        "tied-int4-128": ("qwen2", _dialect, {"tied": True, **WIDE}, {**INT4, "int4_block": 128}),
        "one-head-a-group": ("qwen2", _dialect, {"kv_heads": 4}, BANK),
        "dora": ("qwen3", _dialect, {}, {"dora": True, **BANK}),
        "adapter-bias": ("qwen3", _dialect, {}, {"adapter_bias": True, **BANK}),
        "adapt-ends": ("qwen3", _dialect, {}, {"adapt": ("embed", "head"), **INT4}),
        "adapt-experts": ("qwen3_moe", _dialect, {}, {"adapt": ("experts",), **BANK}),
        "adapt-all": ("qwen2_moe", _dialect, {}, ADAPT_ALL | INT4),
    }
    BUILDS |= {f"{_dialect}-{name}": chosen for name, chosen in _more.items()}
BUILDS["legacy-fp32"] = ("qwen3", "legacy", {}, {"dtype": "float32", **BANK})
SMOKE = (
    "qwen3-native-int4-32",
    "qwen3-legacy-int4-32",
    "gemma2-native-fp16",
    "gemma2-legacy-fp16",
)


def profile(graph: onnx.GraphProto, tokens: int, rows: int) -> dict[str, list[Shape]]:
    """Smallest, typical and largest shape of every input; a bank of 0..R columns a part."""
    sizes = {"b": (1, 1, rows), "s": (1, tokens, tokens)}
    sizes |= {f"t_{group}": (0, 16, RANK * len(PARTS[group])) for group in ALL_GROUPS}
    shapes: dict[str, list[Shape]] = {}
    for value in graph.input:
        dims = value.type.tensor_type.shape.dim
        ranges = [sizes[d.dim_param] if d.dim_param else (d.dim_value,) * 3 for d in dims]
        shapes[value.name] = list(zip(*ranges, strict=True))
    return shapes


def build(path: Path) -> dict[str, Any]:
    """What the child reports after parsing and building two profiles, prefill and decode."""
    graph = onnx.load(str(path), load_external_data=False).graph
    request = {
        "graph": str(path),
        "processors": PROCESSORS,
        "profiles": [profile(graph, CONTEXT, rows=1), profile(graph, 1, rows=4)],
    }
    child = subprocess.run(
        [sys.executable, str(CHILD)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    report = json.loads(child.stdout.splitlines()[-1])
    report["promised"] = ([v.name for v in graph.input], [v.name for v in graph.output])
    return report


def check_builds(tmp_path: Path, name: str) -> None:
    family, dialect, settings, options = BUILDS[name]
    checkpoint = make_checkpoint(tmp_path / "checkpoint", family, **settings)
    chosen = ExportOptions(max_context=CONTEXT, golden=False, dialect=dialect, **options)
    export_checkpoint(checkpoint, tmp_path / "bundle", chosen)
    report = build(tmp_path / "bundle" / GRAPH_FILE)
    assert report["errors"] == []
    assert report["profiles"] == [0, 1]
    assert report["engine_bytes"] > 0
    assert [w for w in report["warnings"] if not any(e in w for e in EXPECTED_WARNINGS)] == []
    assert (report["inputs"], report["outputs"]) == report["promised"]


@pytest.mark.parametrize("name", SMOKE)
def test_tensorrt_builds_the_graph(tmp_path, name):
    check_builds(tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BUILDS if name not in SMOKE])
def test_tensorrt_builds_the_graph_of_every_family(tmp_path, name):
    check_builds(tmp_path, name)


@pytest.mark.slow
def test_a_float32_attention_is_what_the_native_dialect_cannot_build(tmp_path):
    """The reason for a note in bundle.json: fails when TensorRT learns it."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "qwen2")
    options = ExportOptions(max_context=CONTEXT, golden=False, dtype="float32", **NO_BANK)
    export_checkpoint(checkpoint, tmp_path / "bundle", options)
    report = build(tmp_path / "bundle" / GRAPH_FILE)
    assert report["engine_bytes"] == 0
    assert "not supported by a dedicated kernel" in report["errors"][0]
