"""Published bytes to devices, by range, in small messages. Reads files on worker threads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import BinaryIO, Protocol

from remora_contract.errors import ArtifactInvalid, Exhausted, RequestInvalid
from remora_controller.pki import Role
from remora_controller.services.admission import Admission
from remora_controller.services.calls import Context, caller, streaming, unary
from remora_protos.control.v1 import control_pb2 as pb
from remora_protos.control.v1 import control_pb2_grpc as pb_grpc

MESSAGE_BYTES = 256 << 10
MAX_STREAMS = 256
_RETRY_AFTER_S = 5.0


class Source(Protocol):
    """What `Repository` and those around it offer; see there."""

    def manifest_json(self, digest: str) -> bytes: ...

    def chunk(self, digest: str) -> tuple[Path, int]: ...


class ArtifactsService(pb_grpc.ArtifactsServicer):
    def __init__(
        self, repository: Source, admission: Admission, count_bytes: Callable[[int], None]
    ) -> None:
        self._repository = repository
        self._admission = admission
        self._count_bytes = count_bytes
        self._streams = 0

    @unary
    async def GetManifest(
        self, request: pb.GetManifestRequest, context: Context
    ) -> pb.GetManifestResponse:
        await self._admission.known_device(caller(context, Role.DEVICE))
        document = await asyncio.to_thread(self._repository.manifest_json, request.digest)
        return pb.GetManifestResponse(manifest_json=document)

    @streaming
    async def Fetch(
        self, request: pb.FetchRequest, context: Context
    ) -> AsyncIterator[pb.FetchResponse]:
        await self._admission.known_device(caller(context, Role.DEVICE))
        path, size = await asyncio.to_thread(self._repository.chunk, request.chunk_digest)
        end = _range_end(request, size)
        if self._streams >= MAX_STREAMS:
            raise Exhausted(f"{MAX_STREAMS} downloads are under way; try again", _RETRY_AFTER_S)
        self._streams += 1
        try:
            async for data in _read(path, request.offset, end):
                self._count_bytes(len(data))
                yield pb.FetchResponse(data=data)
        finally:
            self._streams -= 1


def _range_end(request: pb.FetchRequest, size: int) -> int:
    end = request.offset + request.length if request.length else size
    if request.offset > size or end > size:
        raise RequestInvalid(
            f"bytes {request.offset} to {end} are outside the chunk's {size} bytes"
        )
    return end


async def _read(path: Path, start: int, end: int) -> AsyncIterator[bytes]:
    """Raises ArtifactInvalid when the file cannot be read or ends early."""
    try:
        with path.open("rb") as f:
            f.seek(start)
            while start < end:
                data = await asyncio.to_thread(_read_some, f, min(MESSAGE_BYTES, end - start))
                if not data:
                    raise ArtifactInvalid(f"chunk file {path.name} ended early; publish it again")
                start += len(data)
                yield data
    except OSError as e:
        raise ArtifactInvalid(f"chunk file {path.name} cannot be read: {e.strerror or e}") from e


def _read_some(f: BinaryIO, count: int) -> bytes:
    return f.read(count)
