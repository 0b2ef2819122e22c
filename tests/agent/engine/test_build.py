"""Builds that go wrong: each ends with an error that says so, and leaves no engine behind."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import onnx
import psutil
import pytest

from remora_agent.engine import build as build_module
from remora_agent.engine.build import never
from remora_agent.engine.cache import EngineCache
from remora_agent.engine.child import ChildLimits, anonymous_bytes, run_child
from remora_agent.engine.opening import EngineOptions, ensure_built, open_engine
from remora_contract import dialects
from remora_contract.bundle import GRAPH_FILE
from remora_contract.errors import (
    ArtifactInvalid,
    Cancelled,
    EngineFault,
    Exhausted,
    Incompatible,
    Refused,
)
from tests.agent.engine.portable import FLOAT32, QWEN2, random_bundle, write_bundle_json

OPTIONS = EngineOptions(rows=1, threads=1)


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines", 1 << 40)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return random_bundle(tmp_path / "bundle")


def test_a_build_reports_progress_and_the_next_one_is_a_cache_hit(bundle: Path, cache: EngineCache):
    seen: list[tuple[str, float]] = []
    first = ensure_built(bundle, cache, OPTIONS, lambda *p: seen.append(p))
    again = ensure_built(bundle, cache, OPTIONS)
    assert not first.from_cache and again.from_cache
    assert again.entry.manifest.digest == first.entry.manifest.digest
    assert {"verifying the graph", "optimising"} <= {p for p, _ in seen}
    fractions = [f for _, f in seen]
    assert fractions == sorted(fractions) and 0 <= fractions[0] <= fractions[-1] <= 1
    assert not list((cache.root / "tmp").iterdir())


def test_the_accuracy_level_is_part_of_the_build(bundle: Path, cache: EngineCache):
    ensure_built(bundle, cache, OPTIONS)
    other = ensure_built(bundle, cache, replace(OPTIONS, accuracy_level=1))
    assert not other.from_cache


def test_a_graph_of_another_dialect_is_refused_with_what_would_take_it(
    tmp_path, cache, monkeypatch
):
    others = tuple(row for row in dialects.SUPPORT if row.backend != "onnxruntime")
    monkeypatch.setattr(dialects, "SUPPORT", others)
    legacy = replace(FLOAT32, dialect="legacy", opset=20)
    bundle = random_bundle(tmp_path / "legacy", graph=legacy)
    with pytest.raises(Incompatible, match=r"dialect: needs tensorrt >= 10\.3"):
        ensure_built(bundle, cache, OPTIONS)


def test_heads_that_the_kernel_cannot_take_are_refused_by_their_size(tmp_path, cache):
    bundle = random_bundle(tmp_path / "odd", spec=replace(QWEN2, head_dim=20))
    with pytest.raises(EngineFault, match="multiple of 8; this model's have 20"):
        ensure_built(bundle, cache, OPTIONS)


def test_a_damaged_engine_is_built_again(bundle: Path, cache: EngineCache):
    entry = ensure_built(bundle, cache, OPTIONS).entry
    os.truncate(entry.directory / "model.data", 100)
    again = ensure_built(bundle, cache, OPTIONS)
    assert not again.from_cache
    open_engine(bundle, cache, OPTIONS).close()


def test_a_damaged_weight_file_is_named(bundle: Path, cache: EngineCache):
    data = bytearray((bundle / "model.onnx.data").read_bytes())
    data[1000] ^= 1
    (bundle / "model.onnx.data").write_bytes(data)
    with pytest.raises(ArtifactInvalid, match=r"model\.onnx\.data is damaged"):
        ensure_built(bundle, cache, OPTIONS)
    assert not cache.stored() and not list((cache.root / "tmp").iterdir())


def _edit(bundle: Path, change) -> None:
    path = bundle / GRAPH_FILE
    proto = onnx.load(path, load_external_data=False)
    change(proto)
    path.write_bytes(proto.SerializeToString())
    write_bundle_json(bundle, QWEN2, FLOAT32)


def _node(proto: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(n for n in proto.graph.node if n.name == name)


def _scale_v(proto: onnx.ModelProto) -> None:
    """Something between the projection and the cache that the rewrite must not lose."""
    node = _node(proto, "layers.1.v.transpose")
    square = onnx.helper.make_node("Mul", [node.input[0]] * 2, ["squared"], name="odd.square")
    proto.graph.node.insert(list(proto.graph.node).index(node), square)
    node.input[0] = "squared"


def _not_causal(proto: onnx.ModelProto) -> None:
    _node(proto, "mask.visible").op_type = "Less"


def _skip_rope(proto: onnx.ModelProto) -> None:
    attention = _node(proto, "layers.0.attention")
    attention.input[0] = _node(proto, "layers.0.q.rope").input[0]


def _extra_op(proto: onnx.ModelProto) -> None:
    node = _node(proto, "layers.0.mlp.product")
    ceil = onnx.helper.make_node("Ceil", [node.output[0]], ["ceil"], name="odd.ceil")
    down = _node(proto, "layers.0.down.matmul")
    proto.graph.node.insert(list(proto.graph.node).index(down), ceil)
    for n in (down, _node(proto, "layers.0.lora_a.down")):
        n.input[0] = "ceil"


def _drop_branch(proto: onnx.ModelProto) -> None:
    add = _node(proto, "layers.1.o.adapted")
    base = add.input[0]
    for node in proto.graph.node:
        for i, name in enumerate(node.input):
            if name == add.output[0]:
                node.input[i] = base


def _other_gate(proto: onnx.ModelProto) -> None:
    node = _node(proto, "layers.0.lora_gate.qkv")
    node.input[1] = "lora_gate.down"


def _swap_rows(proto: onnx.ModelProto) -> None:
    _node(proto, "layers.0.q.transpose").attribute[0].ints[:] = [0, 1, 2, 3]


def _other_norm(proto: onnx.ModelProto) -> None:
    _node(proto, "layers.0.norm_mlp").attribute.append(onnx.helper.make_attribute("stash_type", 10))


def _not_silu(proto: onnx.ModelProto) -> None:
    _node(proto, "layers.0.gate.silu").input[0] = "layers.0.up.slice"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_scale_v, "odd.square|layers.1"),
        (_not_causal, "mask"),
        (_skip_rope, "layers.0.attention"),
        (_extra_op, "odd.ceil"),
        (_drop_branch, "layers.1|lora"),
        (_other_gate, "layers.0.lora_gate.qkv"),
        (_swap_rows, "layers.0.q.transpose"),
        (_other_norm, "layers.0.norm_mlp"),
        (_not_silu, "layers.0.gate.sigmoid"),
    ],
)
def test_a_graph_that_is_not_understood_is_refused_by_node(
    bundle: Path, cache: EngineCache, change, named: str
):
    _edit(bundle, change)
    with pytest.raises(EngineFault, match=named):
        ensure_built(bundle, cache, OPTIONS)


def test_a_graph_that_is_not_onnx_is_refused_by_the_checker(bundle: Path, cache: EngineCache):
    _edit(bundle, lambda proto: proto.graph.node.pop(0))
    with pytest.raises(EngineFault, match="not valid ONNX"):
        ensure_built(bundle, cache, OPTIONS)


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"not a graph"])
def test_bytes_that_are_no_graph_are_refused(bundle: Path, cache: EngineCache, content: bytes):
    (bundle / GRAPH_FILE).write_bytes(content)
    write_bundle_json(bundle, QWEN2, FLOAT32)
    with pytest.raises(EngineFault):
        ensure_built(bundle, cache, OPTIONS)
    assert not cache.stored()


def test_too_little_disk_is_refused_before_the_build(
    bundle: Path, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(build_module, "build_disk_bytes", lambda size, recipe: size << 40)
    with pytest.raises(Exhausted, match="MiB free"):
        ensure_built(bundle, cache, OPTIONS)


def test_a_cancelled_build_leaves_nothing(bundle: Path, cache: EngineCache):
    with pytest.raises(Cancelled, match="was cancelled while"):
        ensure_built(bundle, cache, OPTIONS, cancelled=lambda: True)
    assert not cache.stored() and not list((cache.root / "tmp").iterdir())


def test_a_child_that_says_nothing_any_more_is_ended_as_soon_as_nobody_wants_its_work(
    bundle: Path, cache: EngineCache
):
    calls = []

    def unwanted(phase, done):
        calls.append(phase)
        for child in _build_children():
            child.suspend()  # it stands still from now on, as one that hangs
        if len(calls) > 3:
            raise Cancelled("a newer assignment arrived")

    limits = ChildLimits(wall_s=60.0)
    with pytest.raises(Cancelled, match="newer assignment"):
        ensure_built(bundle, cache, replace(OPTIONS, build_limits=limits), unwanted)
    assert _build_children() == []
    assert not cache.stored() and not list((cache.root / "tmp").iterdir())


def _build_children():
    children = psutil.Process().children()
    return [c for c in children if "remora_agent.engine.build_child" in c.cmdline()]


def test_a_build_past_its_time_limit_is_ended(bundle: Path, cache: EngineCache):
    options = replace(OPTIONS, build_limits=ChildLimits(wall_s=0.05))
    with pytest.raises(Exhausted, match="time limit"):
        ensure_built(bundle, cache, options)


def test_a_build_past_its_memory_limit_is_ended(bundle: Path, cache: EngineCache):
    options = replace(OPTIONS, build_limits=ChildLimits(memory_bytes=1 << 20))
    with pytest.raises(Exhausted, match="limit of 1 MiB"):
        ensure_built(bundle, cache, options)


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Runs a script as a child; `remora_agent.engine.child_side` is at hand in it."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *sys.path]))

    def run(body: str, cancelled: Callable[[], bool] = never, **limits: object):
        text = "import os, sys\nfrom remora_agent.engine.child_side import child_main\n"
        (folder / "scripted.py").write_text(text + textwrap.dedent(body))
        return run_child(
            "scripted",
            [],
            "the work",
            tmp_path / "log",
            ChildLimits(**limits),
            lambda *_: None,
            cancelled,
        )

    return run


def test_a_child_is_what_the_kernel_kills_first_when_memory_runs_out(child):
    text = """
    def work(progress):
        return {"adj": int(open("/proc/self/oom_score_adj").read())}

    child_main(int(sys.argv[1]), work)
    """
    assert child(text)["adj"] >= 500


def test_a_child_that_the_kernel_kills_is_reported_with_where_to_look(child):
    text = """
    def work(progress):
        os.kill(os.getpid(), 9)

    child_main(int(sys.argv[1]), work)
    """
    with pytest.raises(EngineFault, match=r"killed by SIGKILL .*journalctl -k"):
        child(text)


def test_a_child_killed_by_a_signal_is_reported_with_its_last_words(child):
    body = """
    def work(progress):
        progress("crunching", 0.5)
        print("about to fall", flush=True)
        os.kill(os.getpid(), 11)
    child_main(int(sys.argv[1]), work)
    """
    with pytest.raises(EngineFault, match=r"SIGSEGV while crunching.*about to fall"):
        child(body)


def test_a_child_with_an_unexpected_exception_is_reported_with_its_traceback(child):
    with pytest.raises(EngineFault, match=r"exited with status 1.*ZeroDivisionError"):
        child("child_main(int(sys.argv[1]), lambda progress: 1 / 0)")


def test_a_child_that_ends_without_a_result_is_a_fault(child):
    with pytest.raises(EngineFault, match="no result"):
        child("pass")


@pytest.mark.parametrize(
    ("raised", "kind", "words"),
    [
        ("errors.ArtifactInvalid('file x')", ArtifactInvalid, "file x"),
        ("errors.Exhausted('too big')", Exhausted, "too big"),
        ("OSError(28, 'No space left on device', '/x/y')", Exhausted, "/x/y"),
        ("errors.Incompatible([errors.Refusal('a', 'b', 'c')])", Refused, "needs b"),
    ],
)
def test_a_childs_deliberate_error_arrives_as_itself(child, raised: str, kind: type, words: str):
    body = f"""
    from remora_contract import errors
    def work(progress):
        raise {raised}
    sys.exit(child_main(int(sys.argv[1]), work))
    """
    with pytest.raises(kind, match=words):
        child(body)


def test_a_childs_result_comes_back(child):
    assert child("child_main(int(sys.argv[1]), lambda progress: {'n': 3})") == {"n": 3}


def _runs(pid: int) -> bool:
    """Not gone and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_a_hanging_child_started_ends_with_it(child, tmp_path: Path):
    pids = tmp_path / "pids"
    body = f"""
    import subprocess, time
    def work(progress):
        other = subprocess.Popen(["sleep", "600"])
        open({str(pids)!r}, "w").write(f"{{other.pid}}.")
        time.sleep(600)
    child_main(int(sys.argv[1]), work)
    """
    with pytest.raises(Cancelled):
        child(body, cancelled=lambda: pids.exists() and pids.read_text().endswith("."))
    pid = int(pids.read_text().rstrip("."))
    deadline = time.monotonic() + 60
    while _runs(pid):
        assert time.monotonic() < deadline, "the child's child lives on"
        time.sleep(0.01)


def test_a_child_whose_parent_ended_before_it_began_does_nothing(tmp_path: Path):
    """An agent that was killed in that moment: the kernel tells the child of no end."""
    begun, (read_end, write_end) = tmp_path / "begun", os.pipe()
    os.close(read_end)
    text = f"""
    import sys
    from pathlib import Path
    from remora_agent.engine.child_side import child_main
    child_main(int(sys.argv[1]), lambda progress: Path({str(begun)!r}).touch() or {{}})
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), str(write_end)],
        pass_fds=(write_end,),
        capture_output=True,
        text=True,
    )
    os.close(write_end)
    assert (done.returncode, begun.exists()) == (1, False)
    assert "has ended" in done.stderr


def test_anonymous_memory_of_a_process_is_measured_and_of_none_is_zero():
    assert anonymous_bytes(os.getpid()) > 1 << 20
    assert anonymous_bytes(2**22 + 1) == 0
