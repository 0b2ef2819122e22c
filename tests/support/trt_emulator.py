"""A stand-in for the runtime half of `tensorrt`: its "plan" names a portable graph, which ONNX
Runtime runs on the very addresses that were set, in emulated device memory (`cuda_emulator`).

Rules it enforces, and where TensorRT states them (developer guide and `NvInferRuntime.h`):
- set_optimization_profile_async before shapes; a context of a profile's own (`IExecutionContext`).
- set_input_shape inside the active profile's minimum and maximum, else False.
- every input's shape and every tensor's address set before execute_async_v3, else False.
- addresses are 256-byte aligned (`setTensorAddress`: "The pointer must have at least 256-byte
  alignment"); a past and its present at one address (IKVCacheUpdateLayer).
- USER_MANAGED contexts need set_device_memory of device_memory_size_v2 (`setDeviceMemoryV2`).
- "Call enqueueV3() once after an input shape change to flush deferred updates" before capture
  (`IExecutionContext::enqueueV3`).
- TensorRT for RTX: a context compiles the kernels that no runtime cache holds; a cache's blob of
  another version or GPU is refused and leaves the cache as it was (`IRuntimeCache.deserialize`),
  and a cache must outlive the contexts that use it. What contexts compile, and when, is made up.
- what is enqueued uses the addresses and shapes of then; a captured graph replays them, and "the
  best practice is to use one execution context per captured graph": a replay after the context's
  shapes changed is an error here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import IntEnum
from math import prod
from mmap import mmap
from pathlib import Path
from typing import Any
from weakref import ref

import numpy as np
import onnxruntime as ort

from remora_contract.targets import PARTS
from tests.support.cuda_emulator import ALIGNMENT, CudaEmulator
from tests.support.cuda_order import Touches

_NUMPY = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}
SCRATCH = 4096  # bytes that the emulated engine wants of its user


class TensorIOMode(IntEnum):
    INPUT = 1
    OUTPUT = 2


class ExecutionContextAllocationStrategy(IntEnum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class RuntimeCache:
    """What contexts have compiled, by engine and profile."""

    def __init__(self, module: TrtEmulator) -> None:
        self._module = module
        self.kernels: set[str] = set()

    def serialize(self) -> bytes:
        return f"{self._module.environment}\n{json.dumps(sorted(self.kernels))}".encode()

    def deserialize(self, blob: bytes) -> bool:
        self._module.deserialized.append(bytes(blob))
        environment, _, kernels = bytes(blob).decode().partition("\n")
        if environment != self._module.environment:
            return False
        self.kernels = set(json.loads(kernels))
        return True


class RuntimeConfig:
    """How a context is made; one that was given no strategy is STATIC."""

    def __init__(self, module: TrtEmulator) -> None:
        self._module = module
        self.strategy = ExecutionContextAllocationStrategy.STATIC
        self.cache: RuntimeCache | None = None

    def set_execution_context_allocation_strategy(
        self, strategy: ExecutionContextAllocationStrategy
    ) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache(self._module)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


def plan(graph: Path, profiles: list[dict[str, Any]], max_bank_rank: int) -> bytes:
    """What `engine.plan` holds; profiles as in the fact."""
    document = {"emulated": str(graph), "profiles": profiles, "max_bank_rank": max_bank_rank}
    return json.dumps(document).encode()


class TrtEmulator:
    """The module: `TrtEmulator(cuda)` goes where `import tensorrt` would."""

    TensorIOMode = TensorIOMode
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    __version__ = "10.16.0"

    def __init__(self, cuda: CudaEmulator) -> None:
        self.cuda = cuda
        self.calls: list[tuple[Any, ...]] = []
        self.plans: list[bytes | mmap] = []  # what engines were made of
        self.fail_contexts = False  # as when there is no memory for one
        self.fail_enqueue = False
        self.fail_capture = False  # as with networks that wait for the host
        self.contexts = self.engines = 0  # alive
        self.environment = "1.7.1 on an emulated GPU"  # what a runtime cache is bound to
        self.compiled: list[str] = []  # kernels that no cache held
        self.deserialized: list[bytes] = []  # blobs of runtime caches

        class Logger:
            WARNING = 2

            def __init__(self, level: int) -> None: ...

        class Runtime:
            def __init__(_self, logger: Logger) -> None: ...

            def deserialize_cuda_engine(_self, buffer: bytes | mmap) -> CudaEngine | None:
                self.plans.append(buffer)
                data = bytes(buffer)
                return CudaEngine(self, data) if data.startswith(b'{"emulated"') else None

        self.Logger = Logger
        self.Runtime = Runtime

    def nptype(self, dtype: Any) -> type:
        return dtype

    def volume(self, shape: tuple[int, ...]) -> int:
        return prod(shape)


class CudaEngine:
    def __init__(self, module: TrtEmulator, data: bytes) -> None:
        self.module = module
        document = json.loads(data)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        self.session = ort.InferenceSession(
            document["emulated"], options, providers=["CPUExecutionProvider"]
        )
        self._name = Path(document["emulated"]).name
        self.profiles = document["profiles"]
        self._rank = document["max_bank_rank"]
        self.inputs = {v.name: v for v in self.session.get_inputs()}
        self.outputs = {v.name: v for v in self.session.get_outputs()}
        self.device_memory_size_v2 = SCRATCH
        module.engines += 1

    def __del__(self) -> None:
        self.module.engines -= 1

    @property
    def num_io_tensors(self) -> int:
        return len(self.inputs) + len(self.outputs)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return _NUMPY[(self.inputs.get(name) or self.outputs[name]).type]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        shape = (self.inputs.get(name) or self.outputs[name]).shape
        return tuple(d if isinstance(d, int) else -1 for d in shape)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        """Minimum, optimum and maximum."""
        shape = self.inputs[name].shape
        limits = [self._range(d, self.profiles[profile]) for d in shape]
        least, most = tuple(lo for lo, _ in limits), tuple(hi for _, hi in limits)
        return [least, most, most]

    def _range(self, dim: int | str, profile: Mapping[str, int]) -> tuple[int, int]:
        if isinstance(dim, int):
            return dim, dim
        if dim == "m":
            return profile["watched"], profile["watched"]
        if dim in ("b", "rows"):
            return 1, profile["rows"]
        if dim in ("n", "k"):
            return 1, max(profile["rows"], profile["states" if dim == "n" else "logits"])
        if dim == "s":
            return 1, profile["tokens"]
        return 0, self._rank * len(PARTS[dim.removeprefix("t_")])

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self.module)

    def create_execution_context(
        self, how: ExecutionContextAllocationStrategy | RuntimeConfig
    ) -> ExecutionContext | None:
        if self.module.fail_contexts:
            return None
        if not isinstance(how, RuntimeConfig):
            return ExecutionContext(self, how)
        self._compile(how.cache)
        return ExecutionContext(self, how.strategy, how.cache)

    def _compile(self, cache: RuntimeCache | None) -> None:
        kernel = self._name
        if cache is None or kernel not in cache.kernels:
            self.module.compiled.append(kernel)
        if cache is not None:
            cache.kernels.add(kernel)


class ExecutionContext:
    def __init__(
        self,
        engine: CudaEngine,
        strategy: ExecutionContextAllocationStrategy,
        cache: RuntimeCache | None = None,
    ) -> None:
        self._engine = engine
        self._cache = None if cache is None else ref(cache)  # nobody but the user keeps it
        self._module = engine.module
        self._strategy = strategy
        self._profile: int | None = None
        self._memory: tuple[int, int] | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._flushed: dict[str, tuple[int, ...]] | None = None
        self._generation = 0
        self._module.contexts += 1

    def __del__(self) -> None:
        self._module.contexts -= 1

    def set_device_memory(self, address: int, size: int) -> None:
        assert self._strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        assert address % ALIGNMENT == 0 and size >= self._engine.device_memory_size_v2
        self._memory = (address, size)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self._module.cuda.stream(stream)
        if not 0 <= index < len(self._engine.profiles):
            return False
        self._profile, self._shapes = index, {}
        self._record("profile", index)
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._profile is not None, f"{name}: a shape was set before a profile"
        if name not in self._engine.inputs:
            return False
        least, _, most = self._engine.get_tensor_profile_shape(name, self._profile)
        inside = len(shape) == len(least) and all(
            lo <= d <= hi for lo, d, hi in zip(least, shape, most, strict=True)
        )
        if inside:
            if self._shapes.get(name) != tuple(shape):
                self._generation += 1
            self._shapes[name] = tuple(shape)
            self._record("shape", name, tuple(shape))
        return inside

    def set_tensor_address(self, name: str, address: int) -> bool:
        known = name in self._engine.inputs or name in self._engine.outputs
        if not known or address == 0 or address % ALIGNMENT:
            return False
        self._addresses[name] = address
        self._record("address", name, address)
        return True

    def infer_shapes(self) -> list[str]:
        return [n for n in self._engine.inputs if n not in self._shapes]

    def execute_async_v3(self, stream: int) -> bool:
        assert self._cache is None or self._cache() is not None, "the runtime cache is gone"
        if self._module.fail_enqueue:
            return False
        on = self._module.cuda.stream(stream)
        if self._module.fail_capture and on.capturing is not None:
            on.poisoned = True
            return False
        names = [*self._engine.inputs, *self._engine.outputs]
        if self.infer_shapes() or any(n not in self._addresses for n in names):
            return False
        for name in self._engine.outputs:
            past = name.replace("present_", "past_")
            assert past == name or self._addresses[past] == self._addresses[name], (
                f"{name} is not where {past} is"
            )
        assert self._strategy is not ExecutionContextAllocationStrategy.USER_MANAGED or (
            self._memory is not None
        ), "no device memory was given"
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        if on.capturing is None:
            self._flushed = shapes
        else:
            assert self._flushed == shapes, "captured before one run with these shapes"
        generation, memory = self._generation, self._memory
        captured = on.capturing is not None
        self._record("enqueue", "capture" if captured else "run")

        def run() -> None:
            assert not captured or self._generation == generation, "the context's shapes changed"
            self._run(shapes, addresses, memory)

        self._module.cuda.put(stream, run, self._touches(shapes, addresses, memory))
        return True

    def _touches(
        self,
        shapes: dict[str, tuple[int, ...]],
        addresses: dict[str, int],
        memory: tuple[int, int] | None,
    ) -> Touches:
        """Of one run: its tensors, its device memory ("using the same memory for a parallel
        execution context" is undefined, set_device_memory), and the context itself."""
        reads, writes = [], [(-id(self), 1), *([memory] if memory else [])]
        for name in self._engine.inputs:
            size = prod(shapes[name]) * np.dtype(self._engine.get_tensor_dtype(name)).itemsize
            if size:
                writable = name.startswith("past_")  # the present is written in the same place
                (writes if writable else reads).append((addresses[name], size))
        batch = shapes.get("input_ids", shapes.get("logits"))[0]
        for name in self._engine.outputs:
            if not name.startswith("present_"):
                size = self._output_bytes(name, batch, shapes)
                writes.append((addresses[name], size))
        return Touches(tuple(reads), tuple(writes), f"a run of profile {self._profile}")

    def _output_bytes(self, name: str, batch: int, shapes: dict[str, tuple[int, ...]]) -> int:
        named = {
            "b": batch,
            "rows": batch,
            "n": shapes.get("state_index", (batch,))[0],
            "k": shapes.get("logits_index", (batch,))[0],
            "m": shapes.get("watched_ids", (0, 0))[1],
        }
        dims = [d if isinstance(d, int) else named[d] for d in self._engine.outputs[name].shape]
        return prod(dims) * np.dtype(self._engine.get_tensor_dtype(name)).itemsize

    def _run(
        self,
        shapes: dict[str, tuple[int, ...]],
        addresses: dict[str, int],
        memory: tuple[int, int] | None,
    ) -> None:
        if memory is not None:
            self._module.cuda.view(memory[0], memory[1], "scratch")[...] = 0xAB
        feed = {n: self._array(n, shapes[n], addresses[n]) for n in self._engine.inputs}
        if (ids := feed.get("position_ids")) is not None:
            context = feed["past_key.0"].shape[2]
            assert ids.min() >= 0 and ids.max() < context, f"positions {ids} are outside the cache"
        if (ids := feed.get("watched_ids")) is not None:
            assert ids.min() >= 0 and ids.max() < feed["logits"].shape[1], f"watched {ids}"
            assert (feed["temperature"] > 0).all()
        outputs = [*self._engine.outputs]
        results = self._engine.session.run(outputs, feed)
        for name, result in zip(outputs, results, strict=True):
            self._array(name, result.shape, addresses[name])[...] = result

    def _array(self, name: str, shape: tuple[int, ...], address: int) -> np.ndarray:
        dtype = np.dtype(self._engine.get_tensor_dtype(name))
        raw = self._module.cuda.view(address, prod(shape) * dtype.itemsize, name)
        return raw.view(dtype).reshape(shape)

    def _record(self, *call: Any) -> None:
        self._module.calls.append((id(self), *call))
