"""remora.inference.v1.UseCases: named, weighted compositions of adapters."""

from __future__ import annotations

from typing import Any

from remora_agent.bank.directory import AdapterDirectory
from remora_agent.serving import adapter_wire
from remora_agent.serving.router import Router
from remora_agent.serving.rpc_errors import translated
from remora_agent.serving.served_model import ServedModel
from remora_agent.serving.wire import refuse_unknown_fields
from remora_contract.errors import RequestInvalid
from remora_protos.inference.v1 import inference_pb2 as pb
from remora_protos.inference.v1 import inference_pb2_grpc as rpc


class UseCasesService(rpc.UseCasesServicer):
    """Dictionary work only: nothing here waits."""

    def __init__(self, router: Router[ServedModel]) -> None:
        self._router = router

    @translated
    async def Set(self, request: pb.SetUseCaseRequest, context: Any) -> pb.UseCase:
        refuse_unknown_fields(request)
        if not request.use_case.name:
            raise RequestInvalid("use_case.name: name the use case")
        adapters = adapter_wire.weighted_names(request.use_case)
        directory = await self._directory()
        return adapter_wire.use_case(directory.set_use_case(request.use_case.name, adapters))

    @translated
    async def Delete(
        self, request: pb.DeleteUseCaseRequest, context: Any
    ) -> pb.DeleteUseCaseResponse:
        refuse_unknown_fields(request)
        directory = await self._directory()
        return pb.DeleteUseCaseResponse(found=directory.delete_use_case(request.name))

    @translated
    async def List(self, request: pb.ListUseCasesRequest, context: Any) -> pb.ListUseCasesResponse:
        refuse_unknown_fields(request)
        async with self._router.entering() as model:
            use_cases, counts = model.runtime.adapters.directory.use_cases(), model.counts.all()
        return pb.ListUseCasesResponse(
            use_cases=[adapter_wire.use_case(u) for u in use_cases],
            counts=[adapter_wire.use_case_counts(name, count) for name, count in counts],
        )

    async def _directory(self) -> AdapterDirectory:
        async with self._router.entering() as model:
            return model.runtime.adapters.directory
