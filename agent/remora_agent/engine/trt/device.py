"""All that an engine has on the device, and the two steps on it. Knows no rules of the protocol.

One stream runs the steps, one the bank's writes and, where prompts are read beside decode steps,
one these reads, with an execution context and scratch memory of their own. A decode step is one
launch of a CUDA graph (the inputs' copy, the engine and, where there is one, the sampling graph); a
prompt's chunk is enqueued as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remora_agent.engine.protocol import Mix, Shortlist, Watch
from remora_agent.engine.trt.bank import Bank
from remora_agent.engine.trt.contexts import Chain, Context, Plan
from remora_agent.engine.trt.cuda import Cuda
from remora_agent.engine.trt.files import EngineFacts
from remora_agent.engine.trt.graphs import StepGraphs
from remora_agent.engine.trt.inputs import Asked, Places, StepInputs, StepShape
from remora_agent.engine.trt.kernels import KernelCache
from remora_agent.engine.trt.kv import KvCache, KvShape
from remora_agent.engine.trt.memory import Memory, Pinned
from remora_agent.engine.trt.positions import STATES
from remora_agent.engine.trt.sampling import Sampling
from remora_contract import targets
from remora_contract.bundle import GraphSpec
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import RemoraError
from remora_contract.trt_memory import SamplingSize, most_logits


@dataclass(frozen=True)
class DeviceSpec:
    """What is to be allocated: `rows` and `context` as served, the rest as built."""

    decoder: DecoderSpec
    graph: GraphSpec
    facts: EngineFacts
    rows: int
    context: int
    sampling: SamplingSize | None = None
    overlaps: bool = False  # a prompt's chunk may run beside decode steps


class Device:
    def __init__(
        self,
        cuda: Cuda,
        plan: Plan,
        spec: DeviceSpec,
        sampling: Plan | None = None,
        kernels: KernelCache | None = None,
    ) -> None:
        """`kernels`: the plans' own. Raises Exhausted, Unsupported, EngineFault; nothing is then
        left allocated."""
        self._cuda = cuda
        self._memory = Memory(cuda)
        with ExitStack() as self._stack:  # what frees, in the reverse order of making
            self._stack.callback(self._memory.close)
            self._set_up([plan] if sampling is None else [plan, sampling], spec)
            if kernels is not None:
                kernels.keep()
                self._stack.callback(kernels.keep)  # with what steps have compiled
            self._stack = self._stack.pop_all()

    def _set_up(self, plans: list[Plan], spec: DeviceSpec) -> None:
        cuda, memory, graph = self._cuda, self._memory, spec.graph
        dtype = np.dtype(graph.dtype)
        self._runtime = self._stack.enter_context(_Runtime(plans))
        self._vocab = spec.decoder.vocab
        optional = {targets.LAST_INDEX, targets.SEQUENCE_LENGTH}
        self._unread = optional - plans[0].inputs
        self._prefill_profile = spec.facts.index("prefill")
        self._decode_profile = spec.facts.index("decode")
        self.chunk = min(spec.facts.profiles[self._prefill_profile].tokens, spec.context)
        self.stream = memory.stream()
        copies = memory.stream()
        shape = KvShape.of(spec.decoder, spec.rows, graph.context, dtype)
        self.cache = KvCache(cuda, memory, shape, spec.context, moves=spec.overlaps)
        self.bank = Bank(cuda, memory, spec.decoder, graph, (self.stream, copies))
        groups = [g.group for g in self.bank.groups]
        widest = tuple(g.columns.most for g in self.bank.groups)
        most = StepShape(spec.rows, 1, widest), StepShape(1, self.chunk, widest, Asked.EVERY)
        own = [self.bank.row_vectors(shape.rows) for shape in most]
        self.steps = StepInputs(cuda, memory, most[0], groups, dtype, own[0])
        self.prompt = StepInputs(cuda, memory, most[1], groups, dtype, own[1])
        self._make_outputs(spec)
        self._sampling = None
        if spec.sampling is not None:
            self._sampling = Sampling(cuda, memory, spec.sampling, spec.rows, self._logits)
        size = max(plan.scratch_bytes for plan in plans)
        self._scratch = memory.device(size, "what layers take while they run"), size
        self._make_reads(plans[0], spec)
        streams = dict.fromkeys((copies, self._reads, self.stream))
        for stream in streams:
            self._stack.callback(cuda.synchronize, stream)
        self.cache.clear(self.stream)
        self.bank.clear()
        if self._sampling is not None:
            self._sampling.clear(self.stream)
        prefill = plans[0].context(self._prefill_profile, self._read_scratch, self._reads)
        self._runtime.contexts.append(prefill)
        self._graphs = StepGraphs(cuda, self.stream, self._decode_context, self._upload_steps)
        self._stack.callback(self._graphs.close)
        for stream in streams:
            cuda.synchronize(stream)

    def _make_reads(self, plan: Plan, spec: DeviceSpec) -> None:
        """What a prompt's chunk runs on: that of the steps, or all of its own."""
        memory, self._overlaps = self._memory, spec.overlaps
        self._reads, self._read_scratch = self.stream, self._scratch
        self._read_states, self._read_host = self._states, self._host
        if not spec.overlaps:
            return
        self._reads = memory.stream()
        size = plan.scratch_bytes
        self._read_scratch = memory.device(size, "what layers take for a prompt"), size
        self._read_states = memory.device(4 * self.chunk * self._hidden, "a prompt's states")
        answer = max(self.scored * self._vocab, self.chunk * self._hidden)
        self._read_host = memory.pinned(4 * answer, "a prompt's answer")
        self._queued, self._read = memory.event(), memory.event()
        self.bank.after(self._read)

    def _make_outputs(self, spec: DeviceSpec) -> None:
        memory, vocab, self._hidden = self._memory, self._vocab, spec.decoder.hidden
        self._logits = memory.device(4 * spec.rows * vocab, "logits")
        self.scored = most_logits(vocab, self.chunk)
        self._prompt_logits = memory.device(4 * self.scored * vocab, "a prompt's logits")
        most, size = spec.rows, spec.rows * vocab
        if not spec.overlaps:
            most = max(most, self.chunk)
            size = max(size, self.scored * vocab, self.chunk * self._hidden)
        self._states = memory.device(4 * most * self._hidden, "states")
        self._host = memory.pinned(4 * size, "a step's answer")

    def fill(
        self,
        inputs: StepInputs,
        shape: StepShape,
        tokens: NDArray[np.int64],
        at: Places,
        mixes: Mapping[int, Mix],
    ) -> None:
        """Writes a step's inputs; `mixes` by index in the batch."""
        self.bank.hold(inputs.vectors, mixes)
        gates = inputs.write(shape, tokens, at)
        if any(shape.bound):
            for i, gate in enumerate(gates):
                for row, mix in mixes.items():
                    self.bank.fill_gate(i, gate[row], mix)

    def read(self, row: int, shape: StepShape) -> None:
        """Queues a chunk of one row, behind all steps and writes that are queued: only that row's
        slice of the cache is bound. `finish_read` before the next."""
        stream = self._reads
        if self._overlaps:
            self._cuda.record(self._queued, self.stream)
            self._cuda.wait(stream, self._queued)
        outputs = self._prompt_logits, self._read_states
        try:
            self.prompt.upload(stream)
            (context,) = self._runtime.contexts
            slot = self.cache.slots[row]
            context.bind(*self._binding(self.prompt, shape, slot, *outputs))
            context.enqueue(stream)
            size = shape.logits * self._vocab
            if shape.asked is Asked.STATES:
                outputs, size = outputs[::-1], shape.states * self._hidden
            self._cuda.copy(self._read_host.address, outputs[0], 4 * size, "to_host", stream)
        except RemoraError:
            self._cuda.synchronize(stream)  # what was queued before the failure
            raise
        if self._overlaps:
            self._cuda.record(self._read, stream)

    def has_read(self) -> bool:
        """Whether `finish_read` would not wait. Raises EngineFault."""
        return not self._overlaps or self._cuda.has_happened(self._read)

    def finish_read(self) -> None:
        """Waits for the chunk. Raises EngineFault."""
        if self._overlaps:
            self._cuda.synchronize(self._reads)
        else:
            self.finish()

    def exchange(self, row: int, slot: int) -> None:
        """Queues that a row changes places with the one at `slot`, behind all steps."""
        self.cache.exchange(row, slot, self.stream)

    def decode(
        self, shape: StepShape, full: list[int], watches: Mapping[int, Watch] | None = None
    ) -> None:
        """Queues a step of rows 0..shape.rows-1; rows in `full` keep their last position. Of
        `watches`, by index in the batch, only a shortlist is read back."""
        sampling = self._sampling
        if sampling is not None:
            sampling.write(watches or {}, shape.rows, self.stream)
        for row in full:
            self.cache.save_last(row, self.stream)
        try:
            self._graphs.run(shape)
        finally:  # a step that failed may have been queued all the same
            for row in full:
                self.cache.restore_last(row, self.stream)
        if sampling is None or watches is None:
            self._read_back(self._logits, shape.rows * self._vocab)
        else:
            sampling.read_back(shape.rows, self.stream)

    def finish(self) -> None:
        """Waits for what was queued. Raises EngineFault."""
        self.bank.stepped()
        self._cuda.synchronize(self.stream)

    def logits(self, rows: int) -> NDArray[np.float32]:
        """A copy [rows, vocab] of what the last step left."""
        return _copied(self._host, rows, self._vocab)

    def read_logits(self, positions: int) -> NDArray[np.float32]:
        """A copy [positions, vocab] of what the last chunk of a prompt left."""
        return _copied(self._read_host, positions, self._vocab)

    def states(self, tokens: int) -> NDArray[np.float32]:
        """A copy [tokens, hidden] of what the last chunk of a prompt left."""
        return _copied(self._read_host, tokens, self._hidden)

    def shortlist(self, batch: int, rows: Sequence[int]) -> Shortlist:
        """Of some rows of the last step, which had `watches` and `batch` rows."""
        assert self._sampling is not None  # the engine's limits say so
        return self._sampling.found(batch, rows)

    def row_logits(self, row: int) -> NDArray[np.float32]:
        """[vocab] of one row of the last step, read back now. Raises EngineFault."""
        self._read_back(self._logits + 4 * row * self._vocab, self._vocab)
        self._cuda.synchronize(self.stream)
        only: NDArray[np.float32] = self.logits(1)[0]
        return only

    def close(self) -> None:
        """Frees everything once what is queued has run; what cannot be freed hinders nothing else.
        Raises the last EngineFault of it."""
        self._stack.close()

    def _read_back(self, address: int, count: int) -> None:
        """Queues the copy of `count` float32."""
        self._cuda.copy(self._host.address, address, 4 * count, "to_host", self.stream)

    def _upload_steps(self) -> None:
        self.steps.upload(self.stream)
        if self._sampling is not None:
            self._sampling.upload(self.stream)

    def _decode_context(self, shape: StepShape) -> Chain:
        plan, *sampling_plans = self._runtime.plans
        context = plan.context(self._decode_profile, self._scratch, self.stream)
        context.bind(*self._binding(self.steps, shape, 0, self._logits, self._states))
        if self._sampling is None:
            return Chain(context)
        sampling = sampling_plans[0].context(0, self._scratch, self.stream)
        self._sampling.bind(sampling, shape.rows)
        return Chain(context, sampling)

    def _binding(
        self, inputs: StepInputs, shape: StepShape, slot: int, logits: int, states: int
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
        """Shapes and addresses of all tensors for a batch that begins at `slot`; `logits` and
        `states`: where they go."""
        kv = self.cache.shape
        cache = self.cache.addresses(slot)
        shapes: dict[str, tuple[int, ...]] = {
            n: (shape.rows, kv.heads, kv.capacity, kv.dim) for n in cache if n.startswith("past_")
        }
        shapes |= inputs.shapes(shape) | self.bank.shapes(shape.bound)
        addresses = inputs.addresses() | cache | self.bank.addresses()
        for name in self._unread:
            del shapes[name], addresses[name]
        return shapes, addresses | {targets.LOGITS: logits, STATES: states}


def _copied(host: Pinned, *shape: int) -> NDArray[np.float32]:
    found: NDArray[np.float32] = host.array(shape, np.dtype(np.float32)).copy()
    return found


class _Runtime:
    """Holds the engines and the prompts' context, and lets go of them before their memory is freed:
    TensorRT frees an engine's weights with its last reference."""

    def __init__(self, plans: list[Plan]) -> None:
        self.plans = plans
        self.contexts: list[Context] = []

    def __enter__(self) -> _Runtime:
        return self

    def __exit__(self, *error: object) -> None:
        self.contexts.clear()
        self.plans.clear()
