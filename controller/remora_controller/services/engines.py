"""The operator's calls about engines that devices share."""

from __future__ import annotations

from remora_contract.digests import check_digest
from remora_controller import pki
from remora_controller.governance import Governance
from remora_controller.services.calls import Context, caller, unary
from remora_controller.services.diagnostics import Asking
from remora_controller.services.governance import GovernedOperatorService
from remora_controller.services.operator import OperatorParts
from remora_controller.sharing.desk import Desk
from remora_controller.store.sharing import TicketRecord
from remora_protos.operator.v1 import operator_pb2 as pb


class EngineOperatorService(GovernedOperatorService):
    """With the calls about shared engines."""

    def __init__(
        self, parts: OperatorParts, governance: Governance, asking: Asking, desk: Desk
    ) -> None:
        super().__init__(parts, governance, asking)
        self._desk = desk

    @unary
    async def ListSharedEngines(
        self, request: pb.ListSharedEnginesRequest, context: Context
    ) -> pb.ListSharedEnginesResponse:
        caller(context, pki.Role.OPERATOR)
        records = await self._parts.thread.call(self._desk.records)
        return pb.ListSharedEnginesResponse(
            engines=map(shared_engine_message, records),
            policy=self._desk.policy,
            stored_bytes=self._desk.depot.stored_bytes,
            max_bytes=self._desk.depot.max_bytes,
        )

    @unary
    async def RemoveSharedEngine(
        self, request: pb.RemoveSharedEngineRequest, context: Context
    ) -> pb.RemoveSharedEngineResponse:
        by = caller(context, pki.Role.OPERATOR).name
        key = check_digest(request.key_digest)
        await self._parts.thread.call(self._desk.remove, key, request.site, by)
        return pb.RemoveSharedEngineResponse(removed=1)


def shared_engine_message(record: TicketRecord) -> pb.SharedEngine:
    ticket, engine = record.ticket, record.ticket.engine
    return pb.SharedEngine(
        key_digest=record.key.digest,
        site=record.scope,
        state=ticket.state.value,
        engine_digest=engine.digest if engine else "",
        bytes=engine.bytes if engine else 0,
        built_by=engine.built_by if engine else ticket.builder,
        built_at_unix_s=engine.built_at if engine else ticket.began_at,
        taken=record.taken,
        bad=ticket.bad,
        failed=ticket.failed,
        why=ticket.why,
        backend=str(record.key.recipe.get("backend", ""))[:64],
    )
