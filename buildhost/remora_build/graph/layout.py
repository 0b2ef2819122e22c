"""Which initializers the graph has, in the order and at the offsets of model.onnx.data.

Owns names, shapes and offsets (docs/graph.md); reads no checkpoint, builds no node. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from remora_build.families.shape import has_bias, has_norm_bias, layer_norms
from remora_build.graph import forms as matrix_forms
from remora_build.graph import rope
from remora_build.graph.forms import BITS, Forms, Initializer, StoredDtype
from remora_build.graph.forms import codes as codes
from remora_build.graph.forms import scales as scales
from remora_contract.bundle import GraphSpec
from remora_contract.decoder import DecoderSpec, RopeSpec
from remora_contract.targets import EXPERT_GROUPS, PARTS, Group, matrix_name

CODES_A_WORD = 8  # of experts' int4 weights, which lie in int32 (`stacks`)
ALIGNMENT = 4096  # what runtimes need to map a tensor instead of copying it

EMBED = "embed.weight"
HEAD = "head.weight"
FINAL_NORM = "norm"
ROPE_COS = "rope.cos"
ROPE_SIN = "rope.sin"
QUERY_SCALE = "query.scale"
CACHE_POSITIONS = "mask.cache_positions"


@dataclass(frozen=True)
class Slot:
    """One initializer: where its row-major bytes lie in the data file."""

    name: str
    dtype: StoredDtype
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        return (prod(self.shape) * BITS[self.dtype] + 7) // 8


Slots = Mapping[str, Slot]
RopeName = Literal["main", "local"]


def ropes(spec: DecoderSpec) -> dict[RopeName, RopeSpec]:
    """The rotary embeddings that some layer uses."""
    used = {spec.kind(layer).rope for layer in range(spec.layers)}
    found: dict[RopeName, RopeSpec] = {}
    if "main" in used:
        found["main"] = spec.rope
    if "local" in used and spec.local_rope is not None:
        found["local"] = spec.local_rope
    return found


def rope_tables(name: RopeName) -> tuple[str, str]:
    """cos and sin [rows, dims / 2]"""
    return (ROPE_COS, ROPE_SIN) if name == "main" else (f"rope.{name}.cos", f"rope.{name}.sin")


def group_weight(layer: int, group: Group) -> str:
    """[k, n], the parts side by side along n; `.q` and `.scale` when quantized."""
    return f"{matrix_name(layer, group)}.weight"


def group_bias(layer: int, group: Group) -> str:
    return f"{matrix_name(layer, group)}.bias"


def router_weight(layer: int) -> str:
    """[hidden, experts]"""
    return f"layers.{layer}.router.weight"


def shared_gate_weight(layer: int) -> str:
    """[hidden, 1]"""
    return f"layers.{layer}.share.weight"


def group_in(spec: DecoderSpec, group: Group) -> int:
    """k of the packed weight."""
    return spec.in_features(PARTS[group][0])


def group_out(spec: DecoderSpec, group: Group) -> int:
    """n of the packed weight."""
    return sum(spec.out_features(p) for p in PARTS[group])


def has_head(spec: DecoderSpec, graph: GraphSpec) -> bool:
    """Whether the head has a weight of its own; else it is the embedding, transposed."""
    return not spec.tied_embeddings or graph.quant.quantizes("head")


def lay_out(spec: DecoderSpec, graph: GraphSpec, forms: Forms | None = None) -> dict[str, Slot]:
    """Every initializer by name, in file order. `forms` None: as graph.quant says for all."""
    slots: dict[str, Slot] = {}
    end = 0
    for name, dtype, shape in _initializers(spec, graph, forms or Forms(graph.quant)):
        slot = Slot(name, dtype, shape, -(-end // ALIGNMENT) * ALIGNMENT)
        slots[name] = slot
        end = slot.offset + slot.bytes
    return slots


def _initializers(spec: DecoderSpec, graph: GraphSpec, forms: Forms) -> Iterator[Initializer]:
    dtype = graph.dtype
    for rope_name, found in ropes(spec).items():
        rows, pairs = rope.rows(found, graph.context), rope.turning(found, spec.head_dim) // 2
        for table in rope_tables(rope_name):
            yield table, dtype, (rows, pairs)
    if spec.query_scale is not None:
        yield QUERY_SCALE, dtype, (graph.context,)
    yield CACHE_POSITIONS, "int64", (1, 1, 1, graph.context)
    yield EMBED, dtype, (spec.vocab, spec.hidden)
    for layer in range(spec.layers):
        for norm, shape in layer_norms(spec).items():
            yield f"layers.{layer}.{norm}.weight", dtype, shape
            if has_norm_bias(spec, norm):
                yield f"layers.{layer}.{norm}.bias", dtype, shape
        yield from _routing(spec, layer, dtype)
        for group in spec.groups(layer):
            n = group_out(spec, group)
            if has_bias(spec, PARTS[group][0]):
                yield group_bias(layer, group), dtype, (n,)
            name, k = group_weight(layer, group), group_in(spec, group)
            if group in EXPERT_GROUPS:
                yield from _stack(spec, graph, layer, group)
            else:
                yield from matrix_forms.initializers(name, k, n, forms.of(name), dtype)
    yield f"{FINAL_NORM}.weight", dtype, (spec.hidden,)
    if spec.norm_bias:
        yield f"{FINAL_NORM}.bias", dtype, (spec.hidden,)
    if has_head(spec, graph):
        form = forms.of(HEAD)
        yield from matrix_forms.initializers(HEAD, spec.hidden, spec.vocab, form, dtype)


def _routing(spec: DecoderSpec, layer: int, dtype: StoredDtype) -> Iterator[Initializer]:
    if spec.experts is not None and spec.kind(layer).experts:
        yield router_weight(layer), dtype, (spec.hidden, spec.experts.count)
        if spec.experts.shared_gate:
            yield shared_gate_weight(layer), dtype, (spec.hidden, 1)


def _stack(spec: DecoderSpec, graph: GraphSpec, layer: int, group: Group) -> Iterator[Initializer]:
    """Of experts: as floats or in int4."""
    name, count = group_weight(layer, group), spec.copies(PARTS[group][0])
    k, n, block = group_in(spec, group), group_out(spec, group), graph.quant.block
    if block is None:
        yield name, graph.dtype, (count, k, n)
    else:
        yield codes(name), "int32", (count, k // CODES_A_WORD, n)
        yield scales(name), graph.dtype, (count, k // block, n)
