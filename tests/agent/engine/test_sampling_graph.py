"""The sampling graph: what it computes, that TensorRT 10.3's table has it, and that a real TensorRT
builds it, without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from remora_agent.engine.protocol import Watch
from remora_agent.engine.trt.sampling_graph import INPUTS, OUTPUTS, sampling_graph
from remora_build.graph.lint import check_graph
from remora_contract.errors import Unsupported
from tests.support.shortlist_engine import shortlisted

CHILD = Path(__file__).parents[2] / "buildhost" / "tensorrt_rtx_child.py"
VOCABULARIES = (258, 151_936)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_it_computes_what_it_says(vocab, dtype):
    random = np.random.default_rng(vocab)
    logits = (random.standard_normal((3, vocab)) * 4).astype(dtype)
    ids = [random.choice(vocab, count, replace=False) for count in (0, 5, 9)]
    watches = [Watch(i, t) for i, t in zip(ids, (1.0, 0.3, 4.0), strict=True)]
    found = shortlisted(logits, watches, 64)
    exact = logits.astype(np.float64)
    for r, watch in enumerate(watches):
        top = np.argsort(-exact[r], kind="stable")[:64]
        assert np.array_equal(found.logits[r], logits[r][top].astype(np.float32))
        assert np.array_equal(logits[r][found.ids[r]].astype(np.float32), found.logits[r])
        assert len(set(found.ids[r].tolist())) == 64
        assert np.array_equal(found.watched[r, : len(watch.ids)], logits[r][watch.ids])
        below = np.delete(exact[r], found.ids[r]) - exact[r].max()
        assert found.tail[r] == pytest.approx(np.exp(below).sum(), rel=1e-4)
        at = np.exp(below / np.float32(watch.temperature)).sum()
        assert found.tail_at[r] == pytest.approx(at, rel=1e-4)


def test_a_shortlist_of_everything_leaves_no_tail():
    found = shortlisted(np.zeros((1, 4), np.float32), [Watch(np.zeros(0, np.int64))], 100)
    assert found.ids.shape == (1, 4) and found.tail[0] == found.tail_at[0] == 0


@pytest.mark.parametrize("shortlist", [0, 3840])
def test_a_shortlist_that_tensorrt_does_not_take_is_refused(shortlist):
    with pytest.raises(Unsupported, match=f"a shortlist of {shortlist} tokens"):
        sampling_graph(151_936, shortlist)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_tensorrt_103_has_every_operator(vocab, dtype):
    graph = sampling_graph(vocab, 256, dtype)
    onnx.checker.check_model(graph, full_check=True)
    check_graph(ir.from_proto(graph), "legacy")


@pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None,
    reason="tensorrt-rtx is not installed: pip install tensorrt-rtx (or remora[tensorrt])",
)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_tensorrt_builds_it(tmp_path, vocab, dtype):
    path = tmp_path / "sampling.onnx"
    onnx.save(sampling_graph(vocab, 256, dtype), path)
    profile = {
        "logits": [(1, vocab), (4, vocab), (8, vocab)],
        "watched_ids": [(1, 1), (4, 512), (8, 4096)],
        "temperature": [(1, 1), (4, 1), (8, 1)],
    }
    request = {"graph": str(path), "processors": ("SM86", "SM89"), "profiles": [profile]}
    child = subprocess.run(
        [sys.executable, str(CHILD)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    report = json.loads(child.stdout.splitlines()[-1])
    assert report["errors"] == [] and report["engine_bytes"] > 0 and report["profiles"] == [0]
    assert [w for w in report["warnings"] if "has Int64 binding" not in w] == []
    assert (report["inputs"], report["outputs"]) == (list(INPUTS), list(OUTPUTS))
