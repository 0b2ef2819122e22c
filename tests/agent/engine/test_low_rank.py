"""Our operator by itself: its sums, its refusals, its library missing or broken."""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from remora_agent.bank.weights import AdapterWeights
from remora_agent.engine.cache import EngineCache
from remora_agent.engine.opening import device_key, ensure_built, load_engine
from remora_agent.engine.ort import low_rank
from remora_agent.engine.ort.native import build as native_build
from remora_agent.engine.protocol import MixEntry
from remora_contract.bundle import load_bundle
from remora_contract.errors import EngineFault
from remora_contract.targets import AdapterTarget
from tests.agent.engine.conftest import OPTIONS, Bench, Case
from tests.agent.engine.portable import FLOAT32, LLAMA, random_bundle

SOURCES = native_build.HERE
DRIVER = Path(__file__).parents[2] / "support" / "low_rank_driver.c"
NATIVE = Case(LLAMA, FLOAT32)
COMPILER = next((c for c in ("gcc", "clang") if shutil.which(c)), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs gcc or clang")
needs_operator = pytest.mark.skipif(
    bool(low_rank.operator().missing), reason=low_rank.operator().missing
)


def session(k: int, widths: list[int], first: int = 0) -> ort.InferenceSession:
    n = sum(widths)
    inputs = [
        helper.make_tensor_value_info("base", TensorProto.FLOAT, None),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, None),
        helper.make_tensor_value_info("table", TensorProto.INT64, None),
    ]
    node = helper.make_node(
        "LowRankAdd",
        ["base", "x", "table"],
        ["y"],
        domain="com.remora",
        k=k,
        widths=widths,
        first=first,
    )
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["t", n])
    graph = helper.make_graph([node], "g", inputs, [output])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.remora", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    low_rank.register(options)
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


Factors = tuple[np.ndarray, np.ndarray, float]


def table_of(rows: list[list[Factors]], entries: int = 2) -> np.ndarray:
    table = np.zeros((len(rows), entries, 1, 5), np.int64)
    for row, mix in enumerate(rows):
        for e, (a, b, weight) in enumerate(mix):
            bits = int(np.float32(weight).view(np.uint32))
            table[row, e, 0] = (a.ctypes.data, b.ctypes.data, a.shape[1], a.itemsize, bits)
    return table


def factors(rng: np.random.Generator, k: int, n: int, rank: int, dtype: type, weight: float):
    a, b = rng.standard_normal((k, rank)), rng.standard_normal((rank, n))
    return a.astype(dtype), b.astype(dtype), weight


@needs_operator
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 20, 64])
@pytest.mark.parametrize("k, n", [(896, 128), (37, 13), (1030, 530)])
@pytest.mark.parametrize("each", [1, 67])
def test_every_row_gets_its_own_mix_in_any_size(rank: int, k: int, n: int, each: int):
    rng = np.random.default_rng(rank * k + each)
    first = factors(rng, k, n, rank, np.float16, 1.0)
    other = factors(rng, k, n, rank + 1, np.float32, -0.75)
    rows = [[first], [], [first, other], [other], [first]]
    base = rng.standard_normal((len(rows) * each, n)).astype(np.float32)
    x = rng.standard_normal((len(rows) * each, k)).astype(np.float32)
    want = base.astype(np.float64)
    for row, mix in enumerate(rows):
        at = slice(row * each, (row + 1) * each)
        for a, b, weight in mix:
            want[at] += weight * (x[at].astype(np.float64) @ a) @ b
    (y,) = session(k, [n]).run(None, {"base": base, "x": x, "table": table_of(rows)})
    assert np.abs(y - want).max() < 2e-6 * np.abs(want).max()
    assert np.array_equal(y[each : 2 * each], base[each : 2 * each])


@needs_operator
def test_an_answer_is_the_same_to_the_bit_whoever_is_computed_beside_it():
    rng = np.random.default_rng(3)
    mixes = [[factors(rng, 600, 301, rank, np.float16, 0.5)] for rank in (16, 5, 40)]
    base = rng.standard_normal((3, 301)).astype(np.float32)
    x = rng.standard_normal((3, 600)).astype(np.float32)
    run = session(600, [301]).run

    def answers(order: list[int]) -> np.ndarray:
        table = table_of([mixes[i] for i in order])
        (found,) = run(None, {"base": base[order], "x": x[order], "table": table})
        return found

    together = answers([0, 1, 2])
    for order in ([2, 0, 1], [1], [0], [2, 2, 2, 2, 2, 0]):
        assert np.array_equal(answers(order), together[order])


def _broken_table(column: int, value: int) -> Callable[[dict], None]:
    def break_(feed: dict) -> None:
        feed["table"][0, 0, 0, column] = value

    return break_


def _reshaped(name: str, *shape: int) -> Callable[[dict], None]:
    def break_(feed: dict) -> None:
        feed[name] = np.zeros(shape, feed[name].dtype)

    return break_


@needs_operator
@pytest.mark.parametrize(
    "break_, why",
    [
        (_broken_table(0, 0), "a rank without factors"),
        (_broken_table(1, -8), "a rank without factors"),
        (_broken_table(2, -1), "a rank that is not"),
        (_broken_table(2, 1 << 40), "a rank that is not"),
        (_broken_table(3, 8), "neither 2 nor 4"),
        (_reshaped("table", 2, 1, 1, 4), "table is not"),
        (_reshaped("table", 0, 1, 1, 5), "table is not"),
        (_reshaped("table", 2, 1, 0, 5), "too few places"),
        (_reshaped("table", 3, 1, 1, 5), "do not divide"),
        (_reshaped("x", 4, 7), "last axis is not k"),
        (_reshaped("x", 6, 8), "different tokens"),
        (_reshaped("base", 4, 9), "sum of widths"),
    ],
)
def test_a_wrong_input_is_an_error_and_no_crash(break_: Callable[[dict], None], why: str):
    rng = np.random.default_rng(0)
    mix = [factors(rng, 8, 10, 4, np.float32, 1.0)]
    feed = {
        "base": np.zeros((4, 10), np.float32),
        "x": np.zeros((4, 8), np.float32),
        "table": table_of([mix, []]),
    }
    run = session(8, [10]).run
    run(None, feed)
    break_(feed)
    with pytest.raises(Exception, match=why):
        run(None, feed)


@needs_compiler
def test_sanitizers_find_nothing_in_any_instruction_set(tmp_path: Path):
    program = tmp_path / "driver"
    flags = ["-std=c11", "-O1", "-g", "-Wno-psabi", "-fno-sanitize-recover=all"]
    sanitizers = "-fsanitize=address,undefined"
    command = [COMPILER, *flags, sanitizers, f"-I{SOURCES}", "-o", str(program), str(DRIVER)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode and "cannot find" in made.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert made.returncode == 0, made.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr


@needs_compiler
def test_a_library_that_is_missing_broken_or_of_another_version_is_told_and_not_used(
    tmp_path: Path,
):
    absent = low_rank.look_at(tmp_path / "absent.so")
    assert "was not built" in absent.missing and absent.version is None
    corrupt = tmp_path / "corrupt.so"
    corrupt.write_bytes(b"\x7fELF" + bytes(64))
    assert "does not load" in low_rank.look_at(corrupt).missing
    other = tmp_path / "other.so"
    source = tmp_path / "other.c"
    source.write_text("int remora_low_rank_add_version(void) { return 99; }\n")
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", str(other), str(source)], check=True)
    assert "does not load" in low_rank.look_at(other).missing
    source.write_text(
        source.read_text() + 'const char *remora_low_rank_add_products(void) { return "x"; }\n'
    )
    foreign = tmp_path / "foreign.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", str(foreign), str(source)], check=True)
    assert "version 99, not 1" in low_rank.look_at(foreign).missing


@needs_compiler
def test_the_package_builds_a_library_that_loads(tmp_path: Path):
    built = native_build.build(tmp_path / "built.so")
    found = low_rank.look_at(built)
    assert found.missing == "" and found.products in ("base", "avx2", "avx512")


def test_without_a_compiler_the_library_is_not_built_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(native_build.NotBuilt, match="no-such-compiler is not installed"):
        native_build.build(tmp_path / "x.so")
    assert list(tmp_path.iterdir()) == []


@needs_operator
def test_an_engine_built_without_the_library_is_another_engine_in_the_grouped_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    random_bundle(tmp_path / "bundle", LLAMA, FLOAT32)
    cache, bundle = EngineCache(tmp_path / "engines", 1 << 40), load_bundle(tmp_path / "bundle")
    native = ensure_built(tmp_path / "bundle", cache, OPTIONS).entry
    assert device_key(OPTIONS)["low_rank_add"] == "1"
    monkeypatch.setattr(low_rank, "LIBRARY", tmp_path / "absent.so")
    assert "low_rank_add" not in device_key(OPTIONS)
    with pytest.raises(EngineFault, match=r"operator LowRankAdd.*native\.build"):
        load_engine(native, bundle, OPTIONS)
    grouped = ensure_built(tmp_path / "bundle", cache, OPTIONS).entry
    assert grouped.manifest.key.digest != native.manifest.key.digest
    prompt = np.array([3, 4, 5, 6], np.int64)
    engine = load_engine(grouped, bundle, OPTIONS)
    without = engine.prefill(0, prompt, 0)
    engine.close()
    monkeypatch.undo()
    engine = load_engine(native, bundle, OPTIONS)
    assert np.allclose(engine.prefill(0, prompt, 0), without, atol=1e-4)
    engine.close()


@needs_operator
def test_the_conformance_suite_runs_both_forms(make_bench: Callable[[Case], Bench]):
    native = make_bench(NATIVE).open()
    grouped = make_bench(replace(NATIVE, adapters="grouped")).open()
    assert (native._table is None, grouped._table is None) == (False, True)
    native.close()
    grouped.close()


@needs_operator
def test_an_adapter_that_left_leaves_no_memory_and_no_row_that_points_to_it(
    make_bench: Callable[[Case], Bench],
):
    engine = make_bench(NATIVE).open()
    rng, target = np.random.default_rng(0), AdapterTarget(0, "q")
    k, n = LLAMA.in_features("q"), LLAMA.out_features("q")
    a, b, _ = factors(rng, k, n, 4, np.float16, 1.0)
    watched = weakref.ref(a)
    handle = engine.add_adapter(AdapterWeights("sha256:" + "0" * 64, {target: (a, b)}))
    del a, b
    engine.prefill(1, np.array([3, 4, 5], np.int64), 0, (MixEntry(handle, 0.5),))
    gc.collect()
    assert watched() is not None and engine._table._table[1, :, :, 2].any()
    engine.remove_adapter(handle)
    gc.collect()
    assert watched() is None and not engine._table._table[:, :, :, 2].any()
    engine.close()


def _header() -> Path | None:
    """ONNX Runtime's public header, where a development package or the variable gives it."""
    name = "onnxruntime_c_api.h"
    places = [
        Path(p, d, name) for p in ("/usr", "/usr/local") for d in ("include", "include/onnxruntime")
    ]
    given = os.environ.get("ORT_C_API_HEADER")
    return next((p for p in (*([Path(given)] if given else []), *places) if p.is_file()), None)


@pytest.mark.skipif(_header() is None, reason="set ORT_C_API_HEADER to onnxruntime_c_api.h")
def test_the_declared_part_of_the_runtime_is_the_public_headers():
    header = _header()
    assert header is not None
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", header.read_text(), flags=re.S)
    api = text[text.index("struct OrtApi {") :]
    api = api[: api.index("\n};")]
    pattern = (
        r"ORT_API2_STATUS\(\s*(\w+)|ORT_CLASS_RELEASE\(\s*(\w+)\s*\)"
        r"|\(\s*ORT_API_CALL\s*\*\s*(\w+)\s*\)\s*\("
    )
    names = [m[1] or m[3] or f"Release{m[2]}" for m in re.finditer(pattern, api)]
    own = (SOURCES / "runtime.h").read_text()
    declared = dict(re.findall(r"^    (\w+) = (\d+),$", own, flags=re.M))
    assert len(declared) == 15
    assert {name: str(names.index(name)) for name in declared} == declared
    members = text[text.index("struct OrtCustomOp {") :]
    members = members[: members.index("\n};")]
    theirs = re.findall(r"\(\s*ORT_API_CALL\s*\*\s*(\w+)\s*\)", members)
    ours = own[own.index("struct custom_op {") :]
    ours = re.findall(r"\(\*(\w+)\)", ours[: ours.index("\n};")])
    assert len(theirs) == len(ours)
    meant = {"GetName": "name", "CreateKernelV2": "create_kernel_v2", "KernelDestroy": "destroy"}
    meant |= {"KernelComputeV2": "compute_v2", "GetMayInplace": "in_place"}
    meant |= {"GetInputCharacteristic": "input_characteristic", "GetStartVersion": "first_version"}
    assert {n: ours[theirs.index(n)] for n in meant} == meant
