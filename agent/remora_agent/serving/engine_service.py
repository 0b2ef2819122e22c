"""remora.inference.v1.EngineService: what serves, and how busy it is."""

from __future__ import annotations

from typing import Any

from remora_agent.serving import adapter_wire
from remora_agent.serving.router import Router
from remora_agent.serving.rpc_errors import translated
from remora_agent.serving.served_model import ServedModel
from remora_agent.serving.wire import refuse_unknown_fields
from remora_protos.inference.v1 import inference_pb2 as pb
from remora_protos.inference.v1 import inference_pb2_grpc as rpc


class EngineService(rpc.EngineServiceServicer):
    """Answers in every state, also before a model is loaded."""

    def __init__(self, router: Router[ServedModel]) -> None:
        self._router = router

    @translated
    async def Status(self, request: pb.EngineStatusRequest, context: Any) -> pb.EngineStatus:
        refuse_unknown_fields(request)
        model, state = self._router.current, self._router.state
        if model is None:
            return pb.EngineStatus(state=state)
        status = adapter_wire.engine_status(model.runtime.status(), state)
        status.queued += self._router.waiting
        return status
