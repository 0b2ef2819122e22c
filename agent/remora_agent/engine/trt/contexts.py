"""TensorRT's runtime objects, every answer checked. Knows names, shapes and addresses; no meaning.

Contexts bring no memory of their own: steps run one after the other on one stream, so all of them
share one block (`ExecutionContextAllocationStrategy.USER_MANAGED`).
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from typing import Any

import numpy as np

from remora_agent.engine.trt.kernels import KernelCache
from remora_agent.engine.trt.module import TrtModule
from remora_contract.errors import EngineFault, Exhausted

_NOT_ENQUEUED = "TensorRT could not enqueue a step; its log says why"


class Plan:
    """A deserialised engine."""

    def __init__(
        self, module: TrtModule, data: bytes | mmap.mmap, kernels: KernelCache | None = None
    ) -> None:
        """`data` is not needed afterwards; `kernels`: where the module compiles some at load.
        Raises EngineFault when TensorRT does not take it."""
        trt = module.trt
        self._trt = trt
        self._kernels = kernels
        self._logger = trt.Logger(trt.Logger.WARNING)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise EngineFault(
                f"{module.backend} {module.version} cannot load this engine: it was built by "
                "another version or for another GPU and must be built again, or there is no memory "
                "for its weights; the log above says which"
            )
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        modes = {n: self._engine.get_tensor_mode(n) for n in names}
        self.inputs = frozenset(n for n in names if modes[n] == trt.TensorIOMode.INPUT)
        self.outputs = frozenset(names) - self.inputs

    def dtype(self, name: str) -> np.dtype[Any]:
        found: np.dtype[Any] = np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name)))
        return found

    @property
    def profiles(self) -> int:
        return int(self._engine.num_optimization_profiles)

    def most(self, name: str, profile: int) -> tuple[int, ...]:
        """The largest shape of an input that a profile takes."""
        return tuple(self._engine.get_tensor_profile_shape(name, profile)[2])

    @property
    def scratch_bytes(self) -> int:
        """What layers take while they run; all contexts may share it."""
        return int(self._engine.device_memory_size_v2)

    def context(self, profile: int, scratch: tuple[int, int], stream: int) -> Context:
        """Raises Exhausted, EngineFault."""
        how = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._kernels is not None:
            how = self._kernels.config(self._trt, self._engine)
        context = self._engine.create_execution_context(how)
        if context is None:
            raise Exhausted("TensorRT has no memory for another execution context")
        context.set_device_memory(*scratch)
        if not context.set_optimization_profile_async(profile, stream):
            raise EngineFault(f"TensorRT refuses profile {profile} of its own engine")
        return Context(context)


class Chain:
    """Contexts that run one after the other."""

    def __init__(self, *contexts: Context) -> None:
        self._contexts = contexts

    def enqueue(self, stream: int) -> None:
        """Raises EngineFault."""
        if not self.try_enqueue(stream):
            raise EngineFault(_NOT_ENQUEUED)

    def try_enqueue(self, stream: int) -> bool:
        """Whether TensorRT took all of them."""
        return all(context.try_enqueue(stream) for context in self._contexts)


class Context:
    """One execution context with its profile chosen."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def bind(self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        """Every input's shape, then every tensor's address. Raises EngineFault."""
        self.reshape(shapes)
        self.place(addresses)
        try:
            missing = list(self._context.infer_shapes())
        except RuntimeError as e:
            raise EngineFault(f"TensorRT cannot infer the step's shapes: {e}") from e
        if missing:
            raise EngineFault(f"the engine has an input {missing[0]} that nothing is bound to")

    def reshape(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise EngineFault(f"TensorRT refuses {name} {list(shape)}: outside its profile")

    def place(self, addresses: Mapping[str, int]) -> None:
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise EngineFault(f"TensorRT refuses the address {address:#x} of {name}")

    def enqueue(self, stream: int) -> None:
        """Raises EngineFault."""
        if not self.try_enqueue(stream):
            raise EngineFault(_NOT_ENQUEUED)

    def try_enqueue(self, stream: int) -> bool:
        return bool(self._context.execute_async_v3(stream))
