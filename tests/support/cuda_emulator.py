"""A stand-in for `cuda.bindings.runtime` whose device memory is host memory. Strict where the real
one is undefined: what may go wrong on a GPU goes wrong here, always.

- A stream runs nothing until it is waited for, and then only it and what it waits for by events:
  a forgotten synchronisation or fence is seen as a wrong answer.
- Capture records operations and the addresses they have then (CUDA Programming Guide, "Creating a
  Graph Using Stream Capture"); waiting, allocating and freeing during capture are errors (the same,
  "Prohibited and Unhandled Operations").
- Memory is filled with NaN bytes when allocated ("The memory is not cleared", cudaMalloc) and
  poisoned when freed; every operation checks its ranges when it runs, not when it is queued.
- Operations that nothing orders and that touch the same memory are an error when the second is
  queued (`cuda_order`), however they would have run here.
- Asynchronous copies take pinned host memory only: pageable memory is allowed by CUDA but waits.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import repeat
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.support.cuda_order import Order, Touches

ALIGNMENT = 256  # of cudaMalloc (CUDA Programming Guide, "Device Memory Accesses")


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidResourceHandle = 400
    cudaErrorNotReady = 600
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


@dataclass(frozen=True)
class Operation:
    run: Callable[[], None]
    touches: Touches = field(default_factory=Touches)


OK = cudaError_t.cudaSuccess


@dataclass
class Event:
    stream: Stream | None = None
    target: int = 0  # operations of the stream that come before it


@dataclass
class Stream:
    queue: list[Operation] = field(default_factory=list)
    done: int = 0
    capturing: list[Operation] | None = None
    poisoned: bool = False
    handle: int = 0

    @property
    def end(self) -> int:
        return self.done + len(self.queue)

    def run(self, until: int) -> None:
        while self.done < until:
            self.queue.pop(0).run()
            self.done += 1


@dataclass
class _Block:
    buffer: Any  # keeps the memory
    address: int
    size: int
    pinned: bool


class CudaEmulator:
    """Answers as the module does: a tuple of the error and the results."""

    cudaError_t = cudaError_t
    cudaMemcpyKind = cudaMemcpyKind
    cudaStreamCaptureMode = cudaStreamCaptureMode
    cudaStreamNonBlocking = 1
    cudaEventDisableTiming = 2
    cudaHostAllocDefault = 0

    def __init__(self, memory: int = 1 << 30, devices: int = 1, is_shared: bool = True) -> None:
        """`is_shared`: the GPU's memory is the system's, as on a Jetson."""
        self.memory = memory
        self.is_shared = is_shared
        self.devices = devices
        self.calls: list[tuple[Any, ...]] = []
        self.fail: dict[str, cudaError_t] = {}  # the next call of a name answers this
        self.order = Order()
        self.queries: Iterator[bool] = repeat(True)  # what asking for an event finds
        self._blocks: dict[int, _Block] = {}
        self._sorted: list[int] = []
        self._handles: dict[int, Any] = {}
        self._next = 1

    # What tests ask.

    @property
    def live(self) -> list[str]:
        """What has not been given back."""
        blocks = [f"{b.size} bytes" for b in self._blocks.values()]
        return blocks + [type(h).__name__ for h in self._handles.values()]

    @property
    def used(self) -> int:
        return sum(b.size for b in self._blocks.values() if not b.pinned)

    @property
    def pinned(self) -> int:
        return sum(b.size for b in self._blocks.values() if b.pinned)

    def view(self, address: int, size: int, why: str) -> np.ndarray:
        """Bytes [size] of live memory. AssertionError outside one allocation."""
        at = bisect_right(self._sorted, address) - 1
        block = self._blocks.get(self._sorted[at]) if at >= 0 else None
        assert block is not None and address + size <= block.address + block.size, (
            f"{why}: {size} bytes at {address:#x} are outside what is allocated"
        )
        raw = (ctypes.c_uint8 * size).from_address(address)
        return np.frombuffer(raw, np.uint8) if size else np.zeros(0, np.uint8)

    def is_pinned(self, address: int) -> bool:
        at = bisect_right(self._sorted, address) - 1
        return at >= 0 and self._blocks[self._sorted[at]].pinned

    def stream(self, handle: int) -> Stream:
        found = self._handles.get(int(handle))
        assert isinstance(found, Stream), f"{handle} is no live stream"
        return found

    def put(self, stream: int, run: Callable[[], None], touches: Touches) -> None:
        """Queues work, or captures it."""
        found, operation = self.stream(stream), Operation(run, touches)
        if found.capturing is not None:
            found.capturing.append(operation)
            return
        self.order.queued(int(stream), touches)
        found.queue.append(operation)

    # Device.

    def cudaGetErrorName(self, error: cudaError_t) -> tuple[Any, ...]:
        return OK, cudaError_t(error).name.encode()

    def cudaGetErrorString(self, error: cudaError_t) -> tuple[Any, ...]:
        return OK, b"emulated"

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        if not self.devices:
            return cudaError_t.cudaErrorNoDevice, None
        return OK, self.devices

    def cudaSetDevice(self, device: int) -> tuple[Any, ...]:
        return (self._failure("cudaSetDevice"),)

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        return OK, SimpleNamespace(
            name=b"Emulated",
            major=8,
            minor=7,
            totalGlobalMem=self.memory,
            integrated=int(self.is_shared),
        )

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return OK, self.memory - self.used, self.memory

    # Memory.

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        return self._allocate("cudaMalloc", size, pinned=False)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Any, ...]:
        return self._allocate("cudaHostAlloc", size, pinned=True)

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        return self._free("cudaFree", address, pinned=False)

    def cudaFreeHost(self, address: int) -> tuple[Any, ...]:
        return self._free("cudaFreeHost", address, pinned=True)

    def _allocate(self, name: str, size: int, pinned: bool) -> tuple[Any, ...]:
        error = self._failure(name) or self._capture_error()
        if not error and size <= 0:
            error = cudaError_t.cudaErrorInvalidValue
        if not error and not pinned and self.used + size > self.memory:
            error = cudaError_t.cudaErrorMemoryAllocation
        if error:
            return error, None
        raw = (ctypes.c_uint8 * (size + ALIGNMENT))()
        address = -(-ctypes.addressof(raw) // ALIGNMENT) * ALIGNMENT
        self._blocks[address] = _Block(raw, address, size, pinned)
        self._sorted = sorted(self._blocks)
        ctypes.memset(address, 0xFF, size)
        self.calls.append((name, address, size))
        return OK, address

    def _free(self, name: str, address: int, pinned: bool) -> tuple[Any, ...]:
        if error := self._failure(name) or self._capture_error():
            return (error,)
        block = self._blocks.get(int(address))
        if block is None or block.pinned != pinned:
            return (cudaError_t.cudaErrorInvalidValue,)
        ctypes.memset(block.address, 0xEE, block.size)
        del self._blocks[block.address]
        self._sorted = sorted(self._blocks)
        self.calls.append((name, block.address))
        return (OK,)

    def cudaMemcpyAsync(
        self, dst: int, src: int, size: int, kind: cudaMemcpyKind, stream: int
    ) -> tuple[Any, ...]:
        return self.cudaMemcpy2DAsync(dst, size, src, size, size, 1, kind, stream)

    def cudaMemcpy2DAsync(
        self,
        dst: int,
        dst_pitch: int,
        src: int,
        src_pitch: int,
        width: int,
        height: int,
        kind: cudaMemcpyKind,
        stream: int,
    ) -> tuple[Any, ...]:
        if error := self._failure("cudaMemcpyAsync"):
            return (error,)
        if width > min(dst_pitch, src_pitch):
            return (cudaError_t.cudaErrorInvalidValue,)
        self._check_kind(dst, src, kind)

        def copy() -> None:
            for row in range(height):
                to = self.view(dst + row * dst_pitch, width, "copy to")
                to[...] = self.view(src + row * src_pitch, width, "copy from")

        self.calls.append(("copy", cudaMemcpyKind(kind).name, dst, src, width, height))
        reads = tuple((src + row * src_pitch, width) for row in range(height))
        writes = tuple((dst + row * dst_pitch, width) for row in range(height))
        self.put(stream, copy, Touches(reads, writes, "a copy"))
        return (OK,)

    def cudaMemset2DAsync(
        self, dst: int, pitch: int, value: int, width: int, height: int, stream: int
    ) -> tuple[Any, ...]:
        if error := self._failure("cudaMemsetAsync"):
            return (error,)

        def fill() -> None:
            for row in range(height):
                self.view(dst + row * pitch, width, "memset")[...] = value

        writes = tuple((dst + row * pitch, width) for row in range(height))
        self.put(stream, fill, Touches((), writes, "a memset"))
        return (OK,)

    def cudaMemsetAsync(self, dst: int, value: int, size: int, stream: int) -> tuple[Any, ...]:
        return self.cudaMemset2DAsync(dst, size, value, size, 1, stream)

    def _check_kind(self, dst: int, src: int, kind: cudaMemcpyKind) -> None:
        to_host = kind == cudaMemcpyKind.cudaMemcpyDeviceToHost
        from_host = kind == cudaMemcpyKind.cudaMemcpyHostToDevice
        assert self.is_pinned(dst) == to_host, "the destination is not what the kind says"
        assert self.is_pinned(src) == from_host, "the source is not what the kind says"

    # Streams and events.

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        return self._make("cudaStreamCreateWithFlags", Stream())

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        found = self.stream(stream)
        found.run(found.end)  # "resources will be released once the device has completed all work"
        return self._drop(stream, Stream)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        if error := self._failure("cudaStreamSynchronize") or self._capture_error():
            return (error,)
        found = self.stream(stream)
        found.run(found.end)
        self.order.host_waited(int(stream))
        self.calls.append(("synchronize", int(stream)))
        return (OK,)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        return self._make("cudaEventCreateWithFlags", Event())

    def cudaEventDestroy(self, event: int) -> tuple[Any, ...]:
        return self._drop(event, Event)

    def cudaEventRecord(self, event: int, stream: int) -> tuple[Any, ...]:
        found, on = self._handles[int(event)], self.stream(stream)
        assert on.capturing is None, "events inside a capture are not emulated"
        found.stream, found.target = on, on.end
        self.order.recorded(int(event), int(stream))
        self.calls.append(("record", int(event), int(stream)))
        return (OK,)

    def cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[Any, ...]:
        found, on = self._handles[int(event)], self.stream(stream)
        assert on.capturing is None, "events inside a capture are not emulated"
        other, target = found.stream, found.target
        if other is not None:  # an event never recorded is complete
            self.order.waits(int(stream), int(event))
            on.queue.append(Operation(lambda: other.run(target)))
        self.calls.append(("wait", int(stream), int(event)))
        return (OK,)

    def cudaEventQuery(self, event: int) -> tuple[Any, ...]:
        if error := self._failure("cudaEventQuery"):
            return (error,)
        found = self._handles[int(event)]
        self.calls.append(("query", int(event)))
        if found.stream is None:
            return (OK,)
        if found.stream.done < found.target and not next(self.queries):
            return (cudaError_t.cudaErrorNotReady,)
        found.stream.run(found.target)
        self.order.host_saw(int(event))
        return (OK,)

    # Graphs.

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Any, ...]:
        if error := self._failure("cudaStreamBeginCapture"):
            return (error,)
        found = self.stream(stream)
        if found.capturing is not None:
            return (cudaError_t.cudaErrorInvalidValue,)
        found.capturing = []
        self.calls.append(("begin_capture",))
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        found = self.stream(stream)
        operations, found.capturing = found.capturing, None
        invalid, found.poisoned = found.poisoned, False
        if error := self._failure("cudaStreamEndCapture"):
            return error, None
        if operations is None or invalid:
            return cudaError_t.cudaErrorStreamCaptureInvalidated, None
        return self._make("cudaStreamEndCapture", Graph(tuple(operations)))

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:
        found = self._handles[int(graph)]
        return self._make("cudaGraphInstantiate", GraphExec(found.operations))

    def cudaGraphDestroy(self, graph: int) -> tuple[Any, ...]:
        return self._drop(graph, Graph)

    def cudaGraphExecDestroy(self, graph: int) -> tuple[Any, ...]:
        if error := self._failure("cudaGraphExecDestroy"):
            return (error,)
        return self._drop(graph, GraphExec)

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[Any, ...]:
        if error := self._failure("cudaGraphLaunch"):
            return (error,)
        found = self._handles.get(int(graph))
        assert isinstance(found, GraphExec), "a graph was launched that is not there"
        for operation in found.operations:
            self.put(stream, operation.run, operation.touches)
        self.calls.append(("launch", int(graph)))
        return (OK,)

    def _capture_error(self) -> cudaError_t:
        """What waits or allocates invalidates a capture under way."""
        streams = [h for h in self._handles.values() if isinstance(h, Stream)]
        capturing = [s for s in streams if s.capturing is not None]
        for stream in capturing:
            stream.poisoned = True
        return cudaError_t.cudaErrorStreamCaptureUnsupported if capturing else OK

    def _failure(self, name: str) -> cudaError_t:
        return self.fail.pop(name, OK)

    def _make(self, name: str, thing: Any) -> tuple[Any, ...]:
        if error := self._failure(name):
            return error, None
        handle, self._next = self._next, self._next + 1
        self._handles[handle] = thing
        return OK, handle

    def _drop(self, handle: int, kind: type) -> tuple[Any, ...]:
        if not isinstance(self._handles.get(int(handle)), kind):
            return (cudaError_t.cudaErrorInvalidResourceHandle,)
        del self._handles[int(handle)]
        return (OK,)


@dataclass
class Graph:
    operations: tuple[Operation, ...]


@dataclass
class GraphExec:
    operations: tuple[Operation, ...]
