"""EngineSharing: claims, and uploads of what a lease's holder built. Bytes are written on worker
threads, everything else on the store's."""

from __future__ import annotations

import asyncio

from remora_contract.digests import check_digest
from remora_contract.errors import Exhausted, RequestInvalid
from remora_controller.domain import Device
from remora_controller.pki import Role
from remora_controller.services.admission import Admission
from remora_controller.services.calls import Context, caller, unary
from remora_controller.sharing.depot import MAX_CHUNK_BYTES, Depot, parse_offer
from remora_controller.sharing.desk import Desk, Told
from remora_controller.sharing.tickets import Build, Fetch, Wait
from remora_controller.store_thread import StoreThread
from remora_protos.control.v1 import sharing_pb2 as pb
from remora_protos.control.v1 import sharing_pb2_grpc as pb_grpc

MAX_UPLOADS = 16  # chunks in memory at once
_RETRY_AFTER_S = 2.0


class EngineSharingService(pb_grpc.EngineSharingServicer):
    def __init__(self, desk: Desk, depot: Depot, thread: StoreThread, admission: Admission) -> None:
        self._desk, self._depot = desk, depot
        self._thread, self._admission = thread, admission
        self._uploads = 0

    async def _device(self, context: Context) -> Device:
        return await self._admission.known_device(caller(context, Role.DEVICE))

    @unary
    async def ClaimEngine(
        self, request: pb.ClaimEngineRequest, context: Context
    ) -> pb.ClaimEngineResponse:
        device = await self._device(context)
        return claim_message(await self._thread.call(self._desk.claim, device, request.key_json))

    @unary
    async def GiveUpEngine(
        self, request: pb.GiveUpEngineRequest, context: Context
    ) -> pb.GiveUpEngineResponse:
        device, key = await self._device(context), check_digest(request.key_digest)
        blames, why = request.blames_model, request.why
        await self._thread.call(self._desk.give_up, device, key, blames, why)
        return pb.GiveUpEngineResponse()

    @unary
    async def RejectEngine(
        self, request: pb.RejectEngineRequest, context: Context
    ) -> pb.RejectEngineResponse:
        device, key = await self._device(context), check_digest(request.key_digest)
        engine = check_digest(request.engine_digest)
        await self._thread.call(self._desk.reject, device, key, engine, request.why)
        return pb.RejectEngineResponse()

    @unary
    async def OfferEngine(
        self, request: pb.OfferEngineRequest, context: Context
    ) -> pb.OfferEngineResponse:
        device, key = await self._device(context), check_digest(request.key_digest)
        manifest = parse_offer(request.manifest_json)
        name = await self._thread.call(self._desk.allow_offer, device, key, manifest)
        missing = await asyncio.to_thread(self._depot.offer, name, manifest)
        return pb.OfferEngineResponse(missing_chunks=missing)

    @unary
    async def PutEngineChunk(
        self, request: pb.PutEngineChunkRequest, context: Context
    ) -> pb.PutEngineChunkResponse:
        device, key = await self._device(context), check_digest(request.key_digest)
        if len(request.data) > MAX_CHUNK_BYTES:
            raise RequestInvalid(f"a chunk has at most {MAX_CHUNK_BYTES} bytes")
        if self._uploads >= MAX_UPLOADS:
            raise Exhausted(f"{MAX_UPLOADS} chunks arrive at once; try again", _RETRY_AFTER_S)
        self._uploads += 1
        try:
            name = await self._thread.call(self._desk.allow_chunk, device, key)
            chunk = check_digest(request.chunk_digest)
            await asyncio.to_thread(self._depot.put, name, chunk, request.data)
        finally:
            self._uploads -= 1
        return pb.PutEngineChunkResponse()

    @unary
    async def FinishEngine(
        self, request: pb.FinishEngineRequest, context: Context
    ) -> pb.FinishEngineResponse:
        device, key = await self._device(context), check_digest(request.key_digest)
        known = await self._thread.call(self._desk.stored, device, key)
        if known is not None:  # the former answer was lost
            return pb.FinishEngineResponse(engine_digest=known)
        name = await self._thread.call(self._desk.allow_chunk, device, key)
        whole = await asyncio.to_thread(self._depot.finish, name, key)
        where = str(context.peer())
        await self._thread.call(self._desk.finished, device, key, whole, where)
        return pb.FinishEngineResponse(engine_digest=whole.manifest.digest)


def claim_message(told: Told) -> pb.ClaimEngineResponse:
    answer = told.answer
    if isinstance(answer, Build):
        return pb.ClaimEngineResponse(build=pb.BuildEngine(lease_s=answer.lease_s, why=answer.why))
    if isinstance(answer, Fetch):
        engine = answer.engine
        fetch = pb.FetchEngine(digest=engine.digest, bytes=engine.bytes, built_by=engine.built_by)
        return pb.ClaimEngineResponse(fetch=fetch)
    if isinstance(answer, Wait):
        wait = pb.WaitForEngine(why=told.why, ask_again_s=told.ask_again_s)
        return pb.ClaimEngineResponse(wait=wait)
    return pb.ClaimEngineResponse(alone=pb.BuildEngineAlone(why=answer.why))
