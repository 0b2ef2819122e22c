"""What a manifest says of TensorRT's memory is what the device plans by, for every bundle."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remora_contract.bundle import Bundle, BundleFile, GraphSpec
from remora_contract.decoder import DecoderSpec, ExpertsSpec, LayerKind
from remora_contract.digests import digest_bytes
from remora_contract.errors import Exhausted
from remora_contract.memory_need import (
    TENSORRT_FACT,
    Sizing,
    memory_facts,
    memory_need_refusals,
    peak_memory_bytes,
)
from remora_contract.targets import EXPERT_GROUPS, PARTS
from remora_contract.trt_memory import (
    FLOOR_BYTES,
    LEAST_WORKSPACE_BYTES,
    MOST_WORKSPACE_BYTES,
    GpuMemory,
    TrtSizes,
    build_plan,
)
from tests.support.repository import make_bundle

MIB, GIB = 1 << 20, 1 << 30
FILES = (
    BundleFile("model.onnx", 3 * MIB, digest_bytes(b"graph")),
    BundleFile("model.onnx.data", 200 * MIB, digest_bytes(b"weights")),
    BundleFile("tokenizer/tokenizer.json", 9 * MIB, digest_bytes(b"tokens")),
)
TINY = make_bundle(FILES)
LAYERS = [LayerKind(), LayerKind(experts=True)]
EXPERTS = [
    ExpertsSpec(64, 2, 48, renormalize=True),
    ExpertsSpec(3, 1, 16, renormalize=True, shared_intermediate=40),
]
SIZE = st.sampled_from([1, 8, 24, 64, 2048])


@st.composite
def bundles(draw: st.DrawFn) -> Bundle:
    kinds = tuple(draw(st.lists(st.sampled_from(LAYERS), min_size=1, max_size=4)))
    decoder = replace(
        TINY.decoder,
        layers=len(kinds),
        kinds=kinds,
        experts=draw(st.sampled_from(EXPERTS)),
        hidden=draw(SIZE),
        heads=draw(st.sampled_from([2, 4])),
        kv_heads=draw(st.sampled_from([1, 2])),
        head_dim=draw(SIZE),
        intermediate=draw(SIZE),
        vocab=draw(st.sampled_from([1, 100, 151_936, 3 << 20])),
    )
    rank = draw(st.sampled_from([0, 16, 4096]))
    adapt = [part for part in ("embed", "head", "experts") if rank and draw(st.booleans())]
    graph = replace(
        TINY.graph,
        dtype=draw(st.sampled_from(["float16", "float32"])),
        context=draw(st.sampled_from([1, 64, 256, 5000])),
        max_bank_rank=rank,
        adapt=tuple(adapt),
        dora=bool(rank) and draw(st.booleans()),
        adapter_bias=bool(rank) and draw(st.booleans()),
    )
    return replace(TINY, decoder=decoder, graph=graph)


def groups(decoder: DecoderSpec, graph: GraphSpec):
    """(group, E, T_max, k, n) of all that takes adapters."""
    if not graph.max_bank_rank:
        return
    for layer in range(decoder.layers):
        for group in decoder.groups(layer):
            if group not in EXPERT_GROUPS or "experts" in graph.adapt:
                yield of_group(decoder, graph, group)
    for group in graph.adapt:
        if group != "experts":
            yield of_group(decoder, graph, group)


def of_group(decoder: DecoderSpec, graph: GraphSpec, group):
    parts = PARTS[group]
    k, n = decoder.in_features(parts[0]), sum(decoder.out_features(p) for p in parts)
    return group, decoder.copies(parts[0]), graph.max_bank_rank * len(parts), k, n


def by_hand(bundle: Bundle, rows: int, context: int) -> int:
    """The table in docs/tensorrt.md, line by line."""
    decoder, graph = bundle.decoder, bundle.graph
    d = {"float16": 2, "float32": 4}[graph.dtype]
    chunk = min(256, context, graph.context)
    cache = 2 * decoder.layers * rows * decoder.kv_heads * graph.context * decoder.head_dim * d
    bank = layout = vectors = ones = 0
    for group, copies, t, k, n in groups(decoder, graph):
        bank += copies * t * (k + n) * d
        layout = max(layout, copies * t * (max(k, n) if group in EXPERT_GROUPS else k) * d)
        if group not in EXPERT_GROUPS:
            scales, biases = graph.dora, graph.adapter_bias and group != "embed"
            vectors += (rows + 1) * n * d * (scales + biases)
            ones = max(ones, n * d * scales)
    logits = rows * decoder.vocab * 4
    kept = max(1, min(chunk, 16 * MIB // (4 * decoder.vocab)))
    states = max(chunk, rows) * decoder.hidden * 4
    return cache + bank + layout + vectors + ones + logits + kept * decoder.vocab * 4 + states


def pinned_by_hand(bundle: Bundle, rows: int, context: int) -> int:
    decoder, graph = bundle.decoder, bundle.graph
    d = {"float16": 2, "float32": 4}[graph.dtype]
    chunk = min(256, context, graph.context)
    kept = max(1, min(chunk, 16 * MIB // (4 * decoder.vocab)))
    answer = 4 * max(rows * decoder.vocab, kept * decoder.vocab, chunk * decoder.hidden)
    token = 2 * decoder.layers * decoder.kv_heads * decoder.head_dim * d
    blocks = min(max(token, 4 * MIB), graph.context * token)
    found = list(groups(decoder, graph))
    adapters = max([4 * MIB, *(max(t, n) * d for _, _, t, _, n in found)])
    watched, shortlist = 1024, min(256, decoder.vocab)
    up = [8 * rows * watched, 4 * rows]
    lists = sum(-(-size // 256) * 256 for size in up)
    lists += 4 * rows * (2 * shortlist + 2 + watched) + 5 * 256
    gates = {group: t for group, _, t, _, _ in found}
    inputs = (rows + chunk) * 5 * 8 + (rows + 1) * sum(gates.values()) * d
    return answer + blocks + adapters + lists + inputs + 2 * (5 + len(gates)) * 256


@settings(max_examples=400)
@given(
    bundles(),
    st.integers(1, 32),
    st.sampled_from([None, 2, 64, 300]),
    st.integers(MIB, 64 * GIB),
    st.booleans(),
    st.sampled_from(["tensorrt", "tensorrt_rtx"]),
)
def test_a_manifest_s_numbers_are_the_device_s_own(bundle, rows, context, memory, shared, backend):
    facts = json.loads(json.dumps(memory_facts(bundle)))
    assert TrtSizes.read(facts[TENSORRT_FACT]) == TrtSizes.of(bundle)
    gpu = GpuMemory(memory, shared)
    sizing = Sizing(backend, rows, context, 0, "plain", gpu)
    context = context or bundle.graph.context
    rest = by_hand(bundle, rows, context) + 203 * MIB + FLOOR_BYTES
    rest += pinned_by_hand(bundle, rows, context) if shared else 0
    least = rest + 2 * LEAST_WORKSPACE_BYTES
    refusals = memory_need_refusals(facts, sizing, 0)
    peak = peak_memory_bytes(facts, sizing, 0)
    assert [r.code for r in refusals] == (["memory"] if least > memory else [])
    chunk = min(256, context)
    if refusals:
        with pytest.raises(Exhausted) as refused:
            build_plan(TrtSizes.of(bundle), rows, chunk, gpu)
        assert str(refused.value) == str(refusals[0])
        assert peak == least
    elif backend == "tensorrt":
        workspace = min((memory - rest) // 2, MOST_WORKSPACE_BYTES)
        assert peak == rest + workspace <= memory
        assert build_plan(TrtSizes.of(bundle), rows, chunk, gpu).workspace == workspace
    else:
        assert peak == least, "no limit is set, and what layers take is not known"


FACTS = memory_facts(TINY)
GPU = GpuMemory(1, is_shared=False)
SIZING = Sizing("tensorrt", 4, None, 0, "plain", GPU)


def changed(**sizes: object) -> dict[str, object]:
    return {TENSORRT_FACT: {**FACTS[TENSORRT_FACT], **sizes}}


@pytest.mark.parametrize(
    ("facts", "sizing"),
    [
        ({}, SIZING),
        ({"onnxruntime_memory": FACTS["onnxruntime_memory"]}, SIZING),
        (FACTS, replace(SIZING, gpu=None)),
        (FACTS, replace(SIZING, backend="edgellm")),
        (changed(vocab=0), SIZING),
        (changed(bank=-1), SIZING),
        (changed(weights="much"), SIZING),
        ({TENSORRT_FACT: 7}, SIZING),
    ],
)
def test_what_is_not_told_is_neither_shown_nor_refused(facts, sizing):
    assert memory_need_refusals(FACTS, SIZING, 1 << 40) != []
    assert peak_memory_bytes(facts, sizing, 1) is None
    assert memory_need_refusals(facts, sizing, 1) == []


def test_what_a_later_version_adds_does_not_keep_this_one_from_reading():
    assert TrtSizes.read(changed(later=1)[TENSORRT_FACT]) == TrtSizes.of(TINY)
