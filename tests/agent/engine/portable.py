"""Random portable bundles without a checkpoint, and the portable graph itself as the reference.

The graph comes from the exporter's own builder, so what is tested is what is shipped; the weights
are drawn into the slots. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from remora_agent.bank.weights import AdapterWeights, Vectors
from remora_build.graph import layout, rope
from remora_build.graph.data_file import DataFile
from remora_build.graph.decoder import DATA_FILE, build_graph
from remora_build.graph.ops import opset_of
from remora_build.quantize import pack_nibbles
from remora_contract import targets
from remora_contract.bundle import (
    BUNDLE_JSON,
    FORMAT_VERSION,
    GRAPH_FILE,
    LEGACY_GRAPH_FILE,
    TWO_GRAPHS_VERSION,
    Bundle,
    BundleFile,
    GraphSpec,
    QuantSpec,
    SourceInfo,
    bank_groups,
    load_bundle,
)
from remora_contract.decoder import DecoderSpec, ExpertsSpec, LayerKind, RopeSpec
from remora_contract.digests import canonical_json, digest_bytes, digest_file
from remora_contract.targets import EXPERT_GROUPS, PARTS, PROJECTIONS, AdapterTarget

QWEN2 = DecoderSpec(
    family="qwen2",
    layers=2,
    hidden=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    intermediate=96,
    vocab=160,
    norm_eps=1e-6,
    rope=RopeSpec(theta=10000.0),
    qkv_bias=True,
    tied_embeddings=True,
)
QWEN3 = replace(QWEN2, family="qwen3", qkv_bias=False, qk_norm="head", head_dim=32)
LLAMA = replace(QWEN2, family="llama", qkv_bias=False, tied_embeddings=False)
# A layer of experts behind a dense one.
MOE = replace(
    LLAMA,
    family="qwen2_moe",
    kinds=(LayerKind(), LayerKind(experts=True)),
    experts=ExpertsSpec(4, 2, 48, renormalize=True, shared_intermediate=32, shared_gate=True),
)

FLOAT32 = GraphSpec("native", "float32", context=48, max_bank_rank=256, opset=24)
FLOAT16 = replace(FLOAT32, dtype="float16")
INT4 = replace(FLOAT32, quant=QuantSpec("int4", 32))
NO_BANK = replace(FLOAT32, max_bank_rank=0)
# Whatever an adapter may change within the layers.
EVERYTHING = replace(FLOAT32, adapt=("experts",), dora=True, adapter_bias=True)


def in_legacy(graph: GraphSpec) -> GraphSpec:
    return replace(graph, dialect="legacy", opset=opset_of("legacy", graph.quant))


def random_bundle(
    directory: Path,
    spec: DecoderSpec = QWEN2,
    graph: GraphSpec = FLOAT32,
    seed: int = 0,
    both: bool = False,
) -> Path:
    """A bundle directory with graph, weights and bundle.json; no tokenizer. `both`: with the
    legacy graph beside."""
    directory.mkdir(parents=True)
    slots = layout.lay_out(spec, graph)
    rng = np.random.default_rng(seed)
    with DataFile(directory / DATA_FILE) as data:
        for slot in slots.values():
            data.put(slot, _values(rng, slot, spec, graph))
        data.finish(DATA_FILE)
    ir.save(build_graph(spec, graph, slots), directory / GRAPH_FILE)
    if both:
        ir.save(build_graph(spec, in_legacy(graph), slots), directory / LEGACY_GRAPH_FILE)
    write_bundle_json(directory, spec, graph)
    return directory


def write_bundle_json(directory: Path, spec: DecoderSpec, graph: GraphSpec) -> None:
    """Describes the graph files as they are now."""
    both = (directory / LEGACY_GRAPH_FILE).exists()
    files = tuple(
        BundleFile(n, (directory / n).stat().st_size, digest_file(directory / n))
        for n in (GRAPH_FILE, DATA_FILE, *([LEGACY_GRAPH_FILE] if both else []))
    )
    bundle = Bundle(
        TWO_GRAPHS_VERSION if both else FORMAT_VERSION,
        digest_bytes(b"base"),
        spec,
        graph,
        files,
        (1,),
        None,
        None,
        SourceInfo("random", spec.family, graph.dtype),
        "remora 0.1.0",
    )
    (directory / BUNDLE_JSON).write_bytes(canonical_json(bundle))


def _values(rng: np.random.Generator, slot: layout.Slot, spec: DecoderSpec, graph: GraphSpec):
    if slot.name == layout.CACHE_POSITIONS:
        return np.arange(graph.context, dtype=np.int64)
    if slot.name in (layout.ROPE_COS, layout.ROPE_SIN):
        tables = rope.tables(spec.rope, spec.head_dim, graph.context)
        return tables[slot.name == layout.ROPE_SIN].astype(graph.dtype)
    if slot.dtype == "int4":
        return pack_nibbles(rng.integers(-8, 8, slot.shape).astype(np.int8))
    if slot.name.endswith(".scale"):
        return (rng.uniform(0.5, 1.5, slot.shape) / (5 * spec.hidden**0.5)).astype(graph.dtype)
    noise = rng.standard_normal(slot.shape)
    if len(slot.shape) == 1:
        return ((0.2 if "bias" in slot.name else 1.0) + 0.2 * noise).astype(graph.dtype)
    scale = 0.5 if slot.name == layout.EMBED else slot.shape[-2] ** -0.5
    return (scale * noise).astype(graph.dtype)


def random_adapter(
    spec: DecoderSpec,
    seed: int,
    rank: int = 4,
    projections: tuple[targets.Projection, ...] = PROJECTIONS,
    dtype: type[np.floating] = np.float32,
    ranks: dict[targets.Projection, int] | None = None,
) -> AdapterWeights:
    """An adapter that changes answers a good deal; only what a layer has."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(spec.layers):
        for p in (p for p in projections if p in spec.projections(layer)):
            r = (ranks or {}).get(p, rank)
            k, n = spec.in_features(p), spec.out_features(p)
            lead = (spec.copies(p),) if p.startswith("expert_") else ()
            a = rng.standard_normal((*lead, k, r)) / k**0.5
            b = 0.5 * rng.standard_normal((*lead, r, n)) / r**0.5
            tensors[AdapterTarget(layer, p)] = (a.astype(dtype), b.astype(dtype))
    return AdapterWeights(digest_bytes(str(seed).encode()), tensors)


def with_vectors(
    weights: AdapterWeights,
    spec: DecoderSpec,
    seed: int,
    *,
    dora: bool = False,
    bias: bool = False,
    projections: tuple[targets.Projection, ...] = PROJECTIONS,
) -> AdapterWeights:
    """The same with DoRA's factors or biases, or both, around some projections."""
    rng = np.random.default_rng(seed)

    def drawn(n: int, middle: float) -> np.ndarray:
        return (middle + 0.3 * rng.standard_normal(n)).astype(np.float32)

    vectors = {}
    for layer in range(spec.layers):
        for p in (p for p in projections if p in spec.projections(layer)):
            n = spec.out_features(p)
            scale, own = drawn(n, 1) if dora else None, drawn(n, 0) if bias else None
            vectors[AdapterTarget(layer, p)] = Vectors(scale, own)
    digest = digest_bytes(f"{weights.digest}{seed}{dora}{bias}".encode())
    return AdapterWeights(digest, weights.tensors, vectors)


@dataclass(frozen=True)
class Weighted:
    weights: AdapterWeights
    weight: float = 1.0


class Reference:
    """The portable graph run as it is, one row from its first token on."""

    def __init__(self, directory: Path) -> None:
        bundle = load_bundle(directory)
        self.spec, self.graph = bundle.decoder, bundle.graph
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        self._session = ort.InferenceSession(
            str(directory / GRAPH_FILE), options, providers=["CPUExecutionProvider"]
        )

    def logits(self, tokens: list[int], mix: tuple[Weighted, ...] = ()) -> np.ndarray:
        """[vocab] after the last token."""
        s = len(tokens)
        feed = {
            targets.INPUT_IDS: np.array([tokens], np.int64),
            targets.POSITION_IDS: np.arange(s, dtype=np.int64)[None],
            targets.LAST_INDEX: np.array([[s - 1]], np.int64),
            **self._empty_cache(),
            **(self._bank(mix) if self.graph.max_bank_rank else {}),
        }
        return self._session.run([targets.LOGITS], feed)[0][0]

    def _empty_cache(self) -> dict[str, np.ndarray]:
        shape = (1, self.spec.kv_heads, self.graph.context, self.spec.head_dim)
        zeros = np.zeros(shape, self.graph.dtype)
        layers = range(self.spec.layers)
        return {n(i): zeros for i in layers for n in (targets.past_key, targets.past_value)}

    def _bank(self, mix: tuple[Weighted, ...]) -> dict[str, np.ndarray]:
        """The rank-concatenated bank of docs/graph.md, B block-diagonal over the parts."""
        feed: dict[str, np.ndarray] = {}
        for layer in range(self.spec.layers):
            for group in bank_groups(self.spec, self.graph, layer):
                parts = PARTS[group]
                columns = [(w, p, w.weights.rank_of(p)) for w in mix for p in parts]
                gate = [np.full(r, w.weight) for w, _, r in columns]
                feed[targets.lora_gate(group)] = np.concatenate([*gate, np.zeros(0)])[None, None]
                a, b = self._factors(layer, group, columns)
                feed[targets.lora_a(layer, group)] = a
                feed[targets.lora_b(layer, group)] = b
                feed |= self._vectors(layer, group, mix)
        return {name: array.astype(self.graph.dtype) for name, array in feed.items()}

    def _factors(self, layer, group, columns):
        parts = PARTS[group]
        total = sum(r for _, _, r in columns)
        sizes = [self.spec.out_features(p) for p in parts]
        lead = (self.spec.copies(parts[0]),) if group in EXPERT_GROUPS else ()
        a = np.zeros((*lead, self.spec.in_features(parts[0]), total))
        b = np.zeros((*lead, total, sum(sizes)))
        at = 0
        for w, p, r in columns:
            found = w.weights.tensors.get(AdapterTarget(layer, p))
            if found is not None:
                begin, own = sum(sizes[: parts.index(p)]), found[0].shape[-1]
                a[..., at : at + own] = found[0]
                b[..., at : at + own, begin : begin + found[1].shape[-1]] = found[1]
            at += r
        return a, b

    def _vectors(self, layer, group, mix):
        if group in EXPERT_GROUPS:
            return {}
        scale, bias = [], []
        for p in PARTS[group]:
            own_scale = np.ones(self.spec.out_features(p))
            own_bias = np.zeros(self.spec.out_features(p))
            for w in mix:
                found = w.weights.vectors.get(AdapterTarget(layer, p), Vectors())
                own_scale = own_scale if found.scale is None else found.scale
                own_bias = own_bias + (0 if found.bias is None else w.weight * found.bias)
            scale.append(own_scale)
            bias.append(own_bias)
        found = {}
        if self.graph.dora:
            found[targets.lora_scale(layer, group)] = np.concatenate(scale)[None, None]
        if self.graph.adapter_bias:
            found[targets.lora_bias(layer, group)] = np.concatenate(bias)[None, None]
        return found
