"""The native graph passes a real TensorRT parser and builder, ahead of time, without a GPU.

Needs the wheel `tensorrt-rtx`. It runs in a child process: a malformed graph can take the parser
down with it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_contract import targets
from remora_contract.bundle import GRAPH_FILE, Bundle
from remora_contract.targets import GROUPS, PARTS
from tests.support.checkpoints import LLAMA3_SCALING, make_checkpoint

pytestmark = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None,
    reason="tensorrt-rtx is not installed: pip install tensorrt-rtx (or remora[tensorrt])",
)

CHILD = Path(__file__).with_name("tensorrt_rtx_child.py")
TIMEOUT_S = 180
# Said about every int64 input, which is what the contract asks for.
EXPECTED_WARNING = "has Int64 binding"

Shape = tuple[int, ...]


def profile(bundle: Bundle, tokens: int, rows: int) -> dict[str, list[Shape]]:
    """Smallest, typical and largest shape of every input; a bank of 0..R columns a part."""
    spec, graph = bundle.decoder, bundle.graph
    steps = [(1, 1), (1, tokens), (rows, tokens)]
    shapes: dict[str, list[Shape]] = {
        targets.INPUT_IDS: list(steps),
        targets.POSITION_IDS: list(steps),
        targets.LAST_INDEX: [(1, 1), (1, 1), (rows, 1)],
    }
    cache = [(b, spec.kv_heads, graph.context, spec.head_dim) for b in (1, 1, rows)]
    for layer in range(spec.layers):
        shapes |= {targets.past_key(layer): cache, targets.past_value(layer): cache}
    for group in GROUPS if graph.max_bank_rank else ():
        k = spec.in_features(PARTS[group][0])
        n = sum(spec.out_features(p) for p in PARTS[group])
        columns = (0, 16, graph.max_bank_rank * len(PARTS[group]))
        batches = zip((1, 1, rows), columns, strict=True)
        shapes[targets.lora_gate(group)] = [(b, 1, t) for b, t in batches]
        for layer in range(spec.layers):
            shapes[targets.lora_a(layer, group)] = [(k, t) for t in columns]
            shapes[targets.lora_b(layer, group)] = [(t, n) for t in columns]
    return shapes


def build(directory: Path, bundle: Bundle) -> dict:
    """What the child reports after parsing and building two profiles."""
    request = {
        "graph": str(directory / GRAPH_FILE),
        "profiles": [
            profile(bundle, tokens=bundle.graph.context, rows=1),  # prefill
            profile(bundle, tokens=1, rows=4),  # decode
        ],
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
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("family", "settings", "options"),
    [
        ("qwen3", {"head_dim": 32}, {}),
        ("qwen3", {"head_dim": 32, "tied": True}, {"int4_block": 32}),
        ("qwen2", {"hidden": 128, "intermediate": 256}, {"int4_block": 128}),
        ("llama", {"rope_scaling": LLAMA3_SCALING}, {"max_bank_rank": 0}),
    ],
    ids=["qwen3-fp16", "qwen3-int4-32", "qwen2-int4-128", "llama-fp16-no-bank"],
)
def test_tensorrt_builds_the_native_graph_for_orin(tmp_path, family, settings, options):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", family, **settings)
    chosen = ExportOptions(max_context=64, golden=False, **options)
    bundle = export_checkpoint(checkpoint, tmp_path / "bundle", chosen)
    report = build(tmp_path / "bundle", bundle)
    assert report["errors"] == []
    assert report["profiles"] == [0, 1]
    assert report["engine_bytes"] > 0
    assert [w for w in report["warnings"] if EXPECTED_WARNING not in w] == []
    promised = profile(bundle, tokens=1, rows=1)
    assert set(report["inputs"]) == set(promised)
