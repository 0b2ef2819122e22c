"""A checkpoint's tensors into the data file, one after the other: cast, transposed to [k, n],
packed and quantized. Memory: about the largest tensor of the graph.

Owns what each initializer is made of; the slots say where it goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor

import numpy as np
from numpy.typing import NDArray

from remora_build.checkpoint.safetensors_file import TensorEntry
from remora_build.checkpoint.stream import TensorStream
from remora_build.families.naming import Naming, Source
from remora_build.families.shape import has_bias, has_norm_bias, layer_norms
from remora_build.graph import layout, rope
from remora_build.graph.data_file import DataFile
from remora_build.graph.forms import Forms
from remora_build.graph.layout import Slot
from remora_build.graph.matrix_writer import MatrixWriter
from remora_build.graph.stacks import StackWriter
from remora_build.quantize import problem
from remora_build.quantized.matrix import Quantized
from remora_build.quantized.plan import QuantizedPlan
from remora_build.quantized.stored import StoredMatrix
from remora_contract.bundle import GraphSpec
from remora_contract.errors import CheckpointInvalid, InternalFault
from remora_contract.targets import EXPERT_GROUPS, PARTS, Group

Rows = NDArray[np.generic]
Advance = Callable[[int], None]  # bytes of the checkpoint read since the last call


class WeightWriter:
    """Writes every slot. Raises CheckpointInvalid naming the tensor, OSError from the disk."""

    def __init__(
        self,
        naming: Naming,
        graph: GraphSpec,
        slots: Mapping[str, Slot],
        entries: Mapping[str, TensorEntry],
        stream: TensorStream,
        out: DataFile,
        pool: Executor,
        advance: Advance,
        quantized: QuantizedPlan | None = None,
    ) -> None:
        self._naming = naming
        self._spec = naming.spec
        self._graph = graph
        self._slots = slots
        self._entries = entries
        self._stream = stream
        self._out = out
        self._pool = pool
        self._advance = advance
        self._dtype = np.dtype(graph.dtype)
        self._quantized = quantized
        forms = Forms(graph.quant) if quantized is None else quantized.forms
        self._matrices = MatrixWriter(slots, forms, self._dtype, out, pool, self._columns)
        self._stacks = StackWriter(naming, slots, out, pool, self._columns, self._checked_rows)

    def write_all(self) -> None:
        """In the order of the layout."""
        self._tables()
        self._embedding()
        for layer in range(self._spec.layers):
            self._norms(layer)
            self._routing(layer)
            for group in self._spec.groups(layer):
                self._group(layer, group)
        self._norm(layout.FINAL_NORM, [self._naming.final_norm])
        if self._spec.norm_bias:
            self._vector(f"{layout.FINAL_NORM}.bias", [self._naming.final_norm_bias])
        if layout.has_head(self._spec, self._graph):
            naming = self._naming
            name = naming.embedding if self._spec.tied_embeddings else naming.head
            self._matrix(layout.HEAD, [Source(name, 0, self._spec.vocab)])
        for entry in self._quantized.left_out.values() if self._quantized else ():
            self._stream.digest(entry)

    def _tables(self) -> None:
        spec, context = self._spec, self._graph.context
        for name, found in layout.ropes(spec).items():
            tables = rope.tables(found, spec.head_dim, context)
            for slot, table in zip(layout.rope_tables(name), tables, strict=True):
                self._out.put(self._slots[slot], table.astype(self._dtype))
        if spec.query_scale is not None:
            scales = rope.query_scales(spec.query_scale, context)
            self._out.put(self._slots[layout.QUERY_SCALE], scales.astype(self._dtype))
        self._out.put(self._slots[layout.CACHE_POSITIONS], np.arange(context, dtype=np.int64))

    def _norms(self, layer: int) -> None:
        for norm in layer_norms(self._spec):
            self._norm(f"layers.{layer}.{norm}", self._naming.norm(layer, norm))
            if has_norm_bias(self._spec, norm):
                bias = self._naming.norm_bias(layer, norm)
                self._vector(f"layers.{layer}.{norm}.bias", [bias])

    def _norm(self, name: str, sources: Sequence[str]) -> None:
        """A norm's weight; what the checkpoint stores as w - 1 becomes w."""
        self._vector(f"{name}.weight", sources, plus=1 if self._spec.norm_plus_one else 0)

    def _embedding(self) -> None:
        self._out.begin(self._slots[layout.EMBED])
        for _, rows in self._checked_rows(self._naming.embedding):
            self._out.append(rows.astype(self._dtype))

    def _group(self, layer: int, group: Group) -> None:
        if has_bias(self._spec, PARTS[group][0]):
            biases = self._naming.biases(layer, group)
            self._vector(layout.group_bias(layer, group), [b.tensor for b in biases])
        if group in EXPERT_GROUPS:
            self._stacks.write(layer, group, self._graph.quant.block)
        else:
            self._matrix(layout.group_weight(layer, group), self._naming.weights(layer, group))

    def _routing(self, layer: int) -> None:
        experts, naming = self._spec.experts, self._naming
        if experts is None or not self._spec.kind(layer).experts:
            return
        router = Source(naming.router(layer), 0, experts.count)
        self._matrices.plain(layout.router_weight(layer), [router])
        if experts.shared_gate:
            gate = Source(naming.shared_gate(layer), 0, 1)
            self._matrices.plain(layout.shared_gate_weight(layer), [gate])

    def _vector(self, name: str, sources: Sequence[str], plus: int = 0) -> None:
        """Vectors [n] one after the other."""
        slot = self._slots[name]
        parts = [self._checked(s, self._stream.whole(self._entries[s])) for s in sources]
        whole = np.concatenate([p.astype(np.float32) for p in parts]) + np.float32(plus)
        self._out.put(slot, whole.astype(self._dtype).reshape(slot.shape))

    def _matrix(self, name: str, sources: Sequence[Source]) -> None:
        """Matrices [n, k] transposed and side by side: [k, sum n], in the form the graph has."""
        plan = self._quantized
        if plan is None:
            self._matrices.write(name, sources)
            return
        vectors = plan.vectors[name.removesuffix(".weight")]
        if sources[0].tensor in plan.stored:
            self._matrices.write_codes(name, self._stored(plan.stored, sources), vectors)
        else:
            self._matrices.write_plain(name, sources, vectors)

    def _stored(
        self, stored: Mapping[str, StoredMatrix], sources: Sequence[Source]
    ) -> Iterator[tuple[int, Quantized]]:
        """(column in the packed matrix, columns of it) of a quantized checkpoint."""
        base = 0
        for source in sources:
            matrix = stored[source.tensor]
            whole = matrix.read(self._stream, self._dtype)
            matrix.digest(self._stream)
            self._advance(sum(e.bytes for e in matrix.pieces.values()))
            yield base, whole.columns(source.begin, source.end)
            base += source.end - source.begin

    def _columns(self, sources: Sequence[Source]) -> Iterator[tuple[int, Rows]]:
        """(column in the packed matrix, rows [m, k] of a source)."""
        base = 0
        for source in sources:
            n = self._entries[source.tensor].shape[0]
            if (source.begin, source.end) != (0, n):  # a tensor is read, and hashed, as a whole
                raise InternalFault(f"only rows {source.begin} to {source.end} of {source.tensor}")
            for first, rows in self._checked_rows(source.tensor):
                yield base + first, rows
            base += n

    def _checked_rows(self, tensor: str) -> Iterator[tuple[int, Rows]]:
        for first, rows in self._stream.rows(self._entries[tensor]):
            yield first, self._checked(tensor, rows)

    def _checked(self, tensor: str, rows: Rows) -> Rows:
        if why := problem(rows, self._dtype):
            raise CheckpointInvalid(f"{self._entries[tensor].path}: tensor {tensor} {why}")
        self._advance(rows.nbytes)
        return rows
