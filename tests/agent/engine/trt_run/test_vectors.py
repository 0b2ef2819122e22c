"""DoRA's factors, biases and experts' factors on the device: which calls write them, and where."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remora_agent.bank.weights import AdapterWeights, Vectors
from remora_agent.engine.protocol import Engine, MixEntry, RowStep
from remora_agent.engine.trt.cuda import Cuda
from remora_agent.engine.trt.factors import vectors_of
from remora_contract.bundle import load_bundle
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import AdapterInvalid, EngineFault, Exhausted
from remora_contract.targets import EXPERT_GROUPS, PARTS, AdapterTarget
from remora_contract.trt_memory import TrtSizes
from tests.agent.engine.portable import (
    EVERYTHING,
    MOE,
    QWEN2,
    Reference,
    Weighted,
    random_adapter,
    random_bundle,
    with_vectors,
)
from tests.support.cuda_emulator import CudaEmulator, cudaError_t
from tests.support.trt_engines import CHUNK, Bench, build

PROMPT = [3, 4, 5]
ROWS = 4
CLOSE = 5e-5
EXPERTS = tuple(p for group in EXPERT_GROUPS for p in PARTS[group])
# One layer's qkv of QWEN2: 64 + 32 + 32 outputs of float32.
QKV_BYTES = 128 * 4


def dora(spec: DecoderSpec, seed: int, rank: int = 3) -> AdapterWeights:
    return with_vectors(random_adapter(spec, seed, rank), spec, seed, dora=True, bias=True)


def biased(spec: DecoderSpec, seed: int, rank: int = 2) -> AdapterWeights:
    return with_vectors(random_adapter(spec, seed, rank), spec, seed, bias=True)


def built(directory: Path, spec: DecoderSpec, **graph: object) -> Bench:
    bundle = random_bundle(
        directory / "bundle", spec, replace(EVERYTHING, max_bank_rank=64, **graph)
    )
    return Bench(bundle, build(bundle, directory / "engine", rows=ROWS))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return built(tmp_path_factory.mktemp("vectors"), QWEN2)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return built(tmp_path_factory.mktemp("experts"), MOE)


@pytest.fixture(scope="module")
def reference(mixture: Bench) -> Reference:
    return Reference(mixture.bundle_dir)


@pytest.fixture
def gpu(dense: Bench) -> Bench:
    return Bench(dense.bundle_dir, dense.entry)


@pytest.fixture
def engine(gpu: Bench):
    engine = gpu.open()
    for row in range(ROWS):
        engine.prefill(row, ids(1, 2), 0)
    yield engine
    engine.close()


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int64)


def mix_of(engine: Engine, weights: AdapterWeights) -> tuple[MixEntry, ...]:
    return (MixEntry(engine.add_adapter(weights), 1.0),)


def decode(engine: Engine, rows: range, mix=()) -> np.ndarray:
    return engine.decode([RowStep(r, 7, 2, mix) for r in rows])


def kinds_of(gpu: Bench, action) -> list[str]:
    """CUDA's calls that an action makes; of copies the direction."""
    before = len(gpu.cuda.calls)
    action()
    return [c[1] if c[0] == "copy" else c[0] for c in gpu.cuda.calls[before:]]


def places(gpu: Bench, name: str) -> list[int]:
    """Every address that a tensor was bound at, the latest last."""
    found = [c[3] for c in gpu.trt.calls if c[1:3] == ("address", name)]
    return list(dict.fromkeys(reversed(found)))[::-1]


def held(gpu: Bench, address: int, rows: int, width: int) -> np.ndarray:
    """[rows, width] of live device memory."""
    raw = gpu.cuda.view(address, rows * width * 4, "a test")
    return raw.view(np.float32).reshape(rows, width).copy()


def test_one_graph_serves_rows_with_and_without_vectors(gpu: Bench, engine: Engine):
    mixes = [
        mix_of(engine, make(QWEN2, seed, rank=2))
        for seed, make in enumerate((dora, biased, random_adapter))
    ]
    for mix in mixes:
        decode(engine, range(2), mix)
    steps = [RowStep(row, 7, 2, (*mixes, ())[row]) for row in range(2)]
    engine.decode(steps)
    engine.decode(steps[::-1])
    engine.remove_adapter(mixes[0][0].handle)
    decode(engine, range(2), mix_of(engine, dora(QWEN2, 9, rank=2)))
    kinds = [c[0] for c in gpu.cuda.calls]
    assert kinds.count("begin_capture") == 1 and kinds.count("launch") == 5


def test_vectors_travel_when_a_rows_mix_changes_and_only_then(gpu: Bench, engine: Engine):
    one, plain = mix_of(engine, dora(QWEN2, 1)), mix_of(engine, random_adapter(QWEN2, 2))
    for mix in ((), plain, one):  # capture; both layouts
        decode(engine, range(1), mix)
    step = ["launch", "cudaMemcpyDeviceToHost", "record", "synchronize"]
    assert kinds_of(gpu, lambda: decode(engine, range(1), one)) == step
    inputs = 2 * 4  # scale, and as many of bias, of two layers' four groups

    def written(mix) -> list[str]:
        """Behind the last steps, and so that the next step waits."""
        kinds = kinds_of(gpu, lambda: decode(engine, range(1), mix))
        first = next(i for i, kind in enumerate(kinds) if kind != "wait")
        assert first and kinds[-6:] == ["record", "wait", *step]
        return kinds[first:-6]

    assert written(plain) == ["cudaMemcpyDeviceToDevice"] * inputs
    assert written(one) == ["cudaMemcpyHostToDevice"] * 2 * inputs
    decode(engine, range(1), plain)
    for mix in ((), plain):  # neither has any
        assert kinds_of(gpu, lambda mix=mix: decode(engine, range(1), mix)) == step


def test_only_the_rows_that_change_are_written(gpu: Bench, engine: Engine):
    one, two = mix_of(engine, dora(QWEN2, 1)), mix_of(engine, dora(QWEN2, 2))
    decode(engine, range(4), one)
    (address,) = [a for a in places(gpu, "lora_scale.0.qkv") if not _is_prompts(gpu, a)]
    before = len(gpu.cuda.calls)
    steps = [RowStep(r, 7, 2, two if r == 2 else one) for r in range(4)]
    engine.decode(steps)
    copies = [c for c in gpu.cuda.calls[before:] if c[0] == "copy"]
    inside = [c for c in copies if 0 <= c[2] - address < ROWS * QKV_BYTES]
    assert [(c[2] - address, c[4]) for c in inside] == [(2 * QKV_BYTES, QKV_BYTES)]


def _is_prompts(gpu: Bench, address: int) -> bool:
    """Whether memory at an address is for one row."""
    try:
        gpu.cuda.view(address, 2 * QKV_BYTES, "a test")
    except AssertionError:
        return True
    return False


def test_a_prompt_and_the_steps_have_places_of_their_own(gpu: Bench, engine: Engine):
    """The bytes of a row in the middle may begin where TensorRT takes no address."""
    one = mix_of(engine, dora(QWEN2, 1))
    decode(engine, range(4))
    engine.prefill(2, ids(1, 2), 0, one)
    assert len(places(gpu, "lora_scale.1.down")) == len(places(gpu, "lora_bias.0.o")) == 2
    step = [a for a in places(gpu, "lora_scale.0.qkv") if not _is_prompts(gpu, a)]
    assert (held(gpu, step[0], ROWS, 128) == 1).all()


def test_rows_begin_without_vectors_and_end_so_with_their_adapter(gpu: Bench, engine: Engine):
    decode(engine, range(4))
    (scale,) = [a for a in places(gpu, "lora_scale.0.qkv") if not _is_prompts(gpu, a)]
    (bias,) = [a for a in places(gpu, "lora_bias.0.qkv") if not _is_prompts(gpu, a)]
    one, two = mix_of(engine, dora(QWEN2, 1)), mix_of(engine, dora(QWEN2, 2))
    engine.decode([RowStep(r, 7, 2, two if r == 3 else one) for r in range(4)])
    kept = held(gpu, scale, ROWS, 128)[3]
    assert (held(gpu, scale, ROWS, 128) != 1).all()
    engine.remove_adapter(one[0].handle)
    decode(engine, range(3, 4), two)  # any call that waits for the bank's writes
    assert (held(gpu, scale, ROWS, 128)[:3] == 1).all()
    assert (held(gpu, bias, ROWS, 128)[:3] == 0).all()
    assert np.array_equal(held(gpu, scale, ROWS, 128)[3], kept)


def test_a_step_that_does_not_wait_for_its_vectors_answers_wrongly(
    gpu: Bench, engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    own = dora(QWEN2, 1)
    mix = mix_of(engine, own)
    wanted = Reference(gpu.bundle_dir).logits([*PROMPT, 9], (Weighted(own),))
    engine.prefill(0, ids(*PROMPT), 0, mix)
    monkeypatch.setattr(Cuda, "wait", lambda *_: None)
    gpu.cuda.order.strict = False
    first = engine.decode([RowStep(0, 9, 3, mix)])[0]
    monkeypatch.undo()
    assert not np.abs(first - wanted).max() < 1e-2


def test_a_write_that_failed_is_made_again(gpu: Bench, engine: Engine):
    own = dora(QWEN2, 1)
    mix = mix_of(engine, own)
    decode(engine, range(1))
    engine.prefill(0, ids(*PROMPT), 0, mix)
    gpu.cuda.fail["cudaMemcpyAsync"] = cudaError_t.cudaErrorIllegalAddress
    with pytest.raises(EngineFault, match="cudaMemcpy"):
        engine.decode([RowStep(0, 9, 3, mix)])
    logits = engine.decode([RowStep(0, 9, 3, mix)])[0]
    wanted = Reference(gpu.bundle_dir).logits([*PROMPT, 9], (Weighted(own),))
    assert np.abs(logits - wanted).max() < CLOSE


def test_many_steps_and_swaps_allocate_nothing(gpu: Bench, engine: Engine):
    def turn(seed: int) -> None:
        mix = mix_of(engine, (dora, biased)[seed % 2](QWEN2, seed, rank=2))
        engine.prefill(seed % 4, ids(*PROMPT), 0, mix)
        engine.decode([RowStep(seed % 4, 9, 3, mix)])
        engine.remove_adapter(mix[0].handle)

    for seed in range(8):
        turn(seed)
    used, live = gpu.cuda.used, len(gpu.cuda.live)
    for seed in range(8, 40):
        turn(seed)
    assert (gpu.cuda.used, len(gpu.cuda.live)) == (used, live)


@pytest.mark.parametrize("bench", ["dense", "mixture"])
def test_the_memory_plan_counts_them(bench: str, request: pytest.FixtureRequest):
    made: Bench = request.getfixturevalue(bench)
    gpu = Bench(made.bundle_dir, made.entry)
    sizes = TrtSizes.of(load_bundle(gpu.bundle_dir))
    engine = gpu.open()
    plan = sizes.memory_plan(ROWS, weights=0, workspace=0, chunk=CHUNK)
    assert 0 <= gpu.cuda.used - (plan.total - plan.floor) <= 64 << 10
    engine.close()


def test_their_room_by_hand(mixture: Bench):
    """One layer of experts, rank 8, 3 rows: A and B of each group; once more the largest that moves
    with T, here B [4, 16, 96] of expert_gate_up; 4 vectors of each kind for each output, and ones
    for the widest."""
    spec = replace(MOE, layers=1, kinds=MOE.kinds[1:])
    graph = replace(EVERYTHING, max_bank_rank=8)
    dense = ((3, 64, 128), (1, 64, 64), (2, 64, 64), (1, 32, 64))  # qkv, o, the shared expert's
    factors = sum(8 * parts * (k + n) for parts, k, n in dense)
    factors += 4 * (16 * (64 + 96) + 8 * (48 + 64))
    outputs = sum(n for _, _, n in dense)
    sizes = TrtSizes.of(replace(load_bundle(mixture.bundle_dir), decoder=spec, graph=graph))
    assert sizes.bank == 4 * (factors + 4 * 16 * 96)
    assert sizes.vectors_bytes(rows=3) == 4 * ((3 + 1) * 2 * outputs + 128)


def test_what_does_not_fit_is_refused_with_the_bank_named(mixture: Bench):
    sizes = TrtSizes.of(load_bundle(mixture.bundle_dir))
    plan = sizes.memory_plan(ROWS, weights=0, workspace=0)
    cuda = CudaEmulator(plan.total - plan.bank // 2, is_shared=False)
    gpu = Bench(mixture.bundle_dir, mixture.entry, cuda)
    with pytest.raises(Exhausted, match="bank"):
        gpu.open()
    assert cuda.live == []


def test_a_vector_that_float16_cannot_hold_is_refused_by_name(tmp_path: Path):
    engine = built(tmp_path, QWEN2, dtype="float16").open()
    own = random_adapter(QWEN2, 1)
    vectors = {AdapterTarget(1, "k"): Vectors(scale=np.full(32, 1e6, np.float32))}
    with pytest.raises(AdapterInvalid, match=r"layers\.1\.k has numbers that float16 cannot"):
        engine.prepare(AdapterWeights(own.digest, own.tensors, vectors))
    engine.close()


def test_a_float16_engine_answers_as_the_float16_graph(tmp_path: Path):
    gpu = built(tmp_path, MOE, dtype="float16")
    engine, reference = gpu.open(), Reference(gpu.bundle_dir)
    own = dora(MOE, 1)
    tensors = {**own.tensors, **random_adapter(MOE, 2, projections=EXPERTS).tensors}
    own = AdapterWeights(own.digest, tensors, own.vectors)
    mix = mix_of(engine, engine.prepare(own))
    engine.prefill(1, ids(*PROMPT), 0, mix)
    logits = engine.decode([RowStep(1, 9, 3, mix)])[0]
    assert np.abs(logits - reference.logits([*PROMPT, 9], (Weighted(own),))).max() < 2e-2
    engine.close()


def test_what_is_kept_of_an_adapter_keeps_none_of_its_file_alive():
    own = dora(QWEN2, 1)
    kept = vectors_of(own)
    assert not kept.tensors and kept.dora and kept.vectors.keys() == own.vectors.keys()
    for target, pair in kept.vectors.items():
        assert pair.scale.base is None and np.array_equal(pair.scale, own.vectors[target].scale)
        assert pair.bias.base is None and np.array_equal(pair.bias, own.vectors[target].bias)


KINDS = (
    dora(MOE, 1),
    biased(MOE, 2, rank=9),
    random_adapter(MOE, 3, rank=3, projections=EXPERTS),
    random_adapter(MOE, 4, rank=17, projections=("expert_up", "expert_down", "q")),
    random_adapter(MOE, 5, rank=5, projections=(*EXPERTS, "shared_up"), ranks={"expert_gate": 1}),
)


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=8))
def test_any_order_of_adding_removing_and_decoding_answers_as_the_bank_alone(
    mixture: Bench, reference: Reference, turns: list[tuple[int, int]]
):
    """Each turn adds or removes a kind; then all rows decode, each with a mix of what is there:
    DoRA alone, everything else composed."""
    gpu = Bench(mixture.bundle_dir, mixture.entry)
    engine = gpu.open()
    resident: dict[int, int] = {}
    for kind, shift in turns:
        if kind in resident:
            engine.remove_adapter(resident.pop(kind))
        else:
            resident[kind] = engine.add_adapter(KINDS[kind])
        steps, weighted = [], []
        for row in range(4):
            chosen = [k for k in sorted(resident) if (k + row + shift) % 3]
            used = {0: 1.0} if chosen[:1] == [0] else {k: 0.5 + k / 4 for k in chosen}
            mix = tuple(MixEntry(resident[k], w) for k, w in used.items())
            engine.prefill(row, ids(*PROMPT), 0, mix)
            steps.append(RowStep(row, 9, 3, mix))
            weighted.append(tuple(Weighted(KINDS[k], w) for k, w in used.items()))
        for logits, mine in zip(engine.decode(steps), weighted, strict=True):
            assert np.abs(logits - reference.logits([*PROMPT, 9], mine)).max() < CLOSE
    engine.close()
    assert gpu.cuda.live == []
