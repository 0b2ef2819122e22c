"""inference.GRPCInferenceService: the public KServe v2 calls, for Triton's clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from importlib.metadata import version as package_version
from typing import Any, TypeVar

from remora_agent.serving.callers import with_caller
from remora_agent.serving.driver import RequestDriver
from remora_agent.serving.kserve import describe, repository
from remora_agent.serving.kserve.inferring import Inferences
from remora_agent.serving.kserve.names import Target, resolve
from remora_agent.serving.kserve.request import Inference, inference
from remora_agent.serving.kserve.responses import failed
from remora_agent.serving.kserve.statistics import Statistics
from remora_agent.serving.kserve.streams import InferStream
from remora_agent.serving.router import Router
from remora_agent.serving.rpc_errors import translated
from remora_agent.serving.served_model import ServedModel
from remora_agent.serving.wire import refuse_unknown_fields
from remora_agent.serving.writing import STALL_S
from remora_contract.errors import NotFound, RemoraError, RequestInvalid, Unsupported
from remora_protos.kserve.v2 import grpc_service_pb2 as pb
from remora_protos.kserve.v2 import grpc_service_pb2_grpc as rpc

T = TypeVar("T")
_NO_SHARED_MEMORY = "shared memory is not supported; send the values in the request"
_LOAD_S = 60.0  # for a load whose caller sets no deadline


def _unsupported(method: str, why: str) -> Any:
    async def refuse(self: Any, request: Any, context: Any) -> Any:
        raise Unsupported(f"{method}: {why}")

    refuse.__name__ = method
    return translated(refuse)


class KServeService(rpc.GRPCInferenceServiceServicer):
    """`workers` run what waits for the disk or the step thread. A stream of which nothing is read
    for `stall_s` ends."""

    def __init__(
        self,
        router: Router[ServedModel],
        driver: RequestDriver,
        workers: ThreadPoolExecutor,
        statistics: Statistics,
        stall_s: float = STALL_S,
    ) -> None:
        self._router = router
        self._stall_s = stall_s
        self._workers = workers
        self._statistics = statistics
        self._inferences = Inferences(driver, statistics)
        self._version = package_version("remora")

    @translated
    async def ServerLive(self, request: pb.ServerLiveRequest, context: Any) -> Any:
        refuse_unknown_fields(request)
        return pb.ServerLiveResponse(live=True)

    @translated
    async def ServerReady(self, request: pb.ServerReadyRequest, context: Any) -> Any:
        refuse_unknown_fields(request)
        return pb.ServerReadyResponse(ready=self._router.state == "serving")

    @translated
    async def ModelReady(self, request: pb.ModelReadyRequest, context: Any) -> Any:
        """Whether a request for it would be taken; adapters need not be loaded for that."""
        refuse_unknown_fields(request)
        model = self._router.current
        ready = self._router.state == "serving" and model is not None
        if model is not None:
            try:
                _target(model, request)
            except NotFound:
                ready = False
        return pb.ModelReadyResponse(ready=ready)

    @translated
    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Any) -> Any:
        refuse_unknown_fields(request)
        return pb.ServerMetadataResponse(
            name=describe.SERVER, version=self._version, extensions=describe.EXTENSIONS
        )

    @translated
    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Any) -> Any:
        refuse_unknown_fields(request)
        async with self._router.entering() as model:
            versions = repository.versions(model, request.name, request.version)
        return describe.metadata(request.name, versions)

    @translated
    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Any) -> Any:
        refuse_unknown_fields(request)
        async with self._router.entering() as model:
            _target(model, request)
            status = model.runtime.status()
        config = describe.config(request.name, status.bundle_digest, status.context_tokens)
        return pb.ModelConfigResponse(config=config)

    @translated
    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: Any) -> Any:
        """Of one model by the name that the client uses; without a name, of all that answered."""
        refuse_unknown_fields(request)
        if not request.name:
            found = self._statistics.all()
            stats = [describe.model_statistics(*one) for one in found]
        else:
            async with self._router.entering() as model:
                target = _target(model, request)
            counts = self._statistics.of(target.name, target.version)
            stats = [describe.model_statistics(request.name, target.version, counts)]
        return pb.ModelStatisticsResponse(model_stats=stats)

    @translated
    async def ModelInfer(self, request: pb.ModelInferRequest, context: Any) -> Any:
        """The whole answer at once."""
        asked = _asked(request, context)
        if asked.stream:
            raise RequestInvalid("stream: ModelInfer answers once; stream with ModelStreamInfer")
        return await self._inferences.whole(asked, context.time_remaining())

    @translated
    async def ModelStreamInfer(self, requests: Any, context: Any) -> None:
        async def answer(
            request: pb.ModelInferRequest,
        ) -> AsyncGenerator[pb.ModelStreamInferResponse, None]:
            try:
                asked = _asked(request, context)
                streamed = self._inferences.streamed(asked, context.time_remaining())
                async with aclosing(streamed) as responses:
                    async for response in responses:
                        yield response
            except RemoraError as e:
                yield failed(request, e)

        await InferStream(context, answer, stall_s=self._stall_s).run()

    @translated
    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Any) -> Any:
        refuse_unknown_fields(request)
        repository.check_repository(request.repository_name)
        return await self._work(lambda m: repository.index(m, ready_only=request.ready))

    @translated
    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Any
    ) -> Any:
        refuse_unknown_fields(request)
        repository.check_repository(request.repository_name)
        left = context.time_remaining()
        limit = _LOAD_S if left is None else max(left, 0.0)
        await self._work(
            lambda m: repository.load(m, request.model_name, request.parameters, limit)
        )
        return pb.RepositoryModelLoadResponse()

    @translated
    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Any
    ) -> Any:
        refuse_unknown_fields(request)
        repository.check_repository(request.repository_name)
        await self._work(lambda m: repository.unload(m, request.model_name, request.parameters))
        return pb.RepositoryModelUnloadResponse()

    SystemSharedMemoryStatus = _unsupported("SystemSharedMemoryStatus", _NO_SHARED_MEMORY)
    SystemSharedMemoryRegister = _unsupported("SystemSharedMemoryRegister", _NO_SHARED_MEMORY)
    SystemSharedMemoryUnregister = _unsupported("SystemSharedMemoryUnregister", _NO_SHARED_MEMORY)
    CudaSharedMemoryStatus = _unsupported("CudaSharedMemoryStatus", _NO_SHARED_MEMORY)
    CudaSharedMemoryRegister = _unsupported("CudaSharedMemoryRegister", _NO_SHARED_MEMORY)
    CudaSharedMemoryUnregister = _unsupported("CudaSharedMemoryUnregister", _NO_SHARED_MEMORY)
    TraceSetting = _unsupported("TraceSetting", "traces are set in the agent's configuration")
    LogSettings = _unsupported("LogSettings", "logs are set in the agent's configuration")

    async def _work(self, work: Callable[[ServedModel], T]) -> T:
        """As the Adapters service does: waits for a switch, but does not hold one up."""
        async with self._router.entering() as model:
            serving = model
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._workers, lambda: work(serving))


def _asked(request: pb.ModelInferRequest, context: Any) -> Inference:
    asked = inference(request)
    return replace(asked, call=with_caller(asked.call, context))


def _target(model: ServedModel, request: Any) -> Target:
    base, directory = model.runtime.bundle.source.name, model.runtime.adapters.directory
    return resolve(request.name, request.version, base, directory)
