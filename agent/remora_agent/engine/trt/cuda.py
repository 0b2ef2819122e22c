"""Every CUDA call that the engine makes, checked. Knows addresses and bytes; no tensors.

A failed call is an error that names it and CUDA's error: no memory is Exhausted, no device or
driver Unavailable, all else EngineFault. Addresses and handles are plain ints.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal

from remora_contract.errors import EngineFault, Exhausted, Unavailable, Unsupported

Direction = Literal["to_device", "to_host", "on_device"]
_KINDS: dict[Direction, str] = {
    "to_device": "cudaMemcpyHostToDevice",
    "to_host": "cudaMemcpyDeviceToHost",
    "on_device": "cudaMemcpyDeviceToDevice",
}
_NO_MEMORY = "cudaErrorMemoryAllocation"
_NOT_READY = "cudaErrorNotReady"
_NO_DEVICE = frozenset(
    {
        "cudaErrorNoDevice",
        "cudaErrorInsufficientDriver",
        "cudaErrorDevicesUnavailable",
        "cudaErrorInitializationError",
        "cudaErrorSystemDriverMismatch",
    }
)


def load_bindings() -> Any:
    """`cuda.bindings.runtime`. Raises Unsupported with what to install."""
    try:
        return import_module("cuda.bindings.runtime")
    except ImportError as e:
        raise Unsupported(
            "TensorRT engines need CUDA's Python bindings: pip install 'remora[tensorrt]'"
        ) from e


class Cuda:
    """`runtime` is `cuda.bindings.runtime` or something that answers as it does."""

    def __init__(self, runtime: Any) -> None:
        self._rt = runtime

    def open_device(self) -> None:
        """Makes the first device current. Raises Unavailable where there is none."""
        count = self._call("cudaGetDeviceCount")
        if not count:
            raise Unavailable("CUDA sees no GPU; serve on ONNX Runtime (--backend onnxruntime)")
        self._call("cudaSetDevice", 0)

    def free_memory(self) -> tuple[int, int]:
        """Bytes free and in all; on a Jetson the system's own memory."""
        free, total = self._call("cudaMemGetInfo")
        return int(free), int(total)

    def allocate(self, size: int, what: str) -> int:
        """Device memory of `size` > 0 bytes, not cleared. Raises Exhausted."""
        return int(self._call("cudaMalloc", size, about=f"{size} bytes for {what}"))

    def shares_memory(self) -> bool:
        """Whether the GPU's memory is the system's, as on a Jetson."""
        return bool(self._call("cudaGetDeviceProperties", 0).integrated)

    def available_memory(self, of_system: int) -> int:
        """Bytes that may be taken. Where the GPU shares the system's memory, `of_system` bytes
        count: what the kernel would give back of its caches, CUDA does not see."""
        free, _ = self.free_memory()
        return max(free, of_system) if self.shares_memory() else free

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def allocate_pinned(self, size: int, what: str) -> int:
        """Host memory that the device reads and writes. Raises Exhausted."""
        about = f"{size} bytes of pinned memory for {what}"
        flags = self._rt.cudaHostAllocDefault
        return int(self._call("cudaHostAlloc", size, flags, about=about))

    def free_pinned(self, address: int) -> None:
        self._call("cudaFreeHost", address)

    def copy(self, dst: int, src: int, size: int, direction: Direction, stream: int) -> None:
        """Queues a copy of `size` bytes."""
        kind = self._kind(direction)
        self._call("cudaMemcpyAsync", dst, src, size, kind, stream)

    def copy_2d(
        self,
        dst: tuple[int, int],
        src: tuple[int, int],
        width: int,
        height: int,
        direction: Direction,
        stream: int,
    ) -> None:
        """Queues a copy of `height` runs of `width` bytes; ends are (address, pitch in bytes)."""
        kind = self._kind(direction)
        self._call("cudaMemcpy2DAsync", *dst, *src, width, height, kind, stream)

    def clear(self, address: int, size: int, stream: int) -> None:
        """Queues zeros."""
        self._call("cudaMemsetAsync", address, 0, size, stream)

    def clear_2d(self, address: int, pitch: int, width: int, height: int, stream: int) -> None:
        self._call("cudaMemset2DAsync", address, pitch, 0, width, height, stream)

    def make_stream(self) -> int:
        """One that does not wait for the default stream."""
        return int(self._call("cudaStreamCreateWithFlags", self._rt.cudaStreamNonBlocking))

    def destroy_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        """Waits until all that is queued has run; raises what failed meanwhile."""
        self._call("cudaStreamSynchronize", stream)

    def make_event(self) -> int:
        return int(self._call("cudaEventCreateWithFlags", self._rt.cudaEventDisableTiming))

    def destroy_event(self, event: int) -> None:
        self._call("cudaEventDestroy", event)

    def record(self, event: int, stream: int) -> None:
        self._call("cudaEventRecord", event, stream)

    def has_happened(self, event: int) -> bool:
        """Whether all that was queued before the event has run; raises what failed meanwhile."""
        (error,) = self._rt.cudaEventQuery(event)
        if int(error) and self._code(error) != _NOT_READY:
            self._raise("cudaEventQuery", error, "")
        return not int(error)

    def wait(self, stream: int, event: int) -> None:
        """What is queued on `stream` from now on runs after the event."""
        self._call("cudaStreamWaitEvent", stream, event, 0)

    def begin_capture(self, stream: int) -> None:
        """Only this thread's calls are held to a capture's rules."""
        mode = self._rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> int:
        """What was captured, ready to launch. Raises Exhausted, EngineFault."""
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return int(self._call("cudaGraphInstantiate", graph, 0, about="a CUDA graph"))
        finally:
            self._call("cudaGraphDestroy", graph)

    def abandon_capture(self, stream: int) -> None:
        """Ends a capture whose calls failed; what it made is destroyed."""
        error, graph = self._rt.cudaStreamEndCapture(stream)
        if not int(error):
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: int, stream: int) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        self._call("cudaGraphExecDestroy", graph)

    def _kind(self, direction: Direction) -> Any:
        return getattr(self._rt.cudaMemcpyKind, _KINDS[direction])

    def _call(self, name: str, *args: Any, about: str = "") -> Any:
        """The result, a tuple where there are several; raises the error."""
        error, *results = getattr(self._rt, name)(*args)
        if int(error):
            self._raise(name, error, about)
        return results[0] if len(results) == 1 else tuple(results)

    def _raise(self, name: str, error: Any, about: str) -> None:
        code = self._code(error)
        said = f"{name} failed with {code}" + (f" ({about})" if about else "")
        if code == _NO_MEMORY:
            raise Exhausted(f"the GPU has no memory left: {said}; serve fewer rows or adapters")
        if code in _NO_DEVICE:
            raise Unavailable(f"no GPU can be used: {said}; is the NVIDIA driver installed?")
        raise EngineFault(said)

    def _code(self, error: Any) -> str:
        _, text = self._rt.cudaGetErrorName(error)
        return text.decode() if isinstance(text, bytes) else str(text)
