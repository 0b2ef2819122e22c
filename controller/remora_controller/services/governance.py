"""The operator's calls about groups, pins, quarantine, approvals, the audit log, and questions to
devices."""

from __future__ import annotations

from remora_controller import pki
from remora_controller.audit import AuditEntry
from remora_controller.domain import Device
from remora_controller.governance import MAX_AUDIT_PAGE, Governance
from remora_controller.groups import Group
from remora_controller.pki import OperatorRole
from remora_controller.services import operator_wire as wire
from remora_controller.services.access import may_call
from remora_controller.services.calls import Context, caller, unary
from remora_controller.services.diagnostics import Asking
from remora_controller.services.operator import OperatorParts, OperatorService
from remora_protos.operator.v1 import operator_pb2 as pb


class GovernedOperatorService(OperatorService):
    """With the calls that govern."""

    def __init__(self, parts: OperatorParts, governance: Governance, asking: Asking) -> None:
        super().__init__(parts)
        self._governance = governance
        self._asking = asking

    @unary
    async def AskDevice(self, request: pb.AskDeviceRequest, context: Context) -> pb.DeviceAnswer:
        return await self._asking.ask(request)

    @unary
    async def GetAnswer(self, request: pb.GetAnswerRequest, context: Context) -> pb.DeviceAnswer:
        return self._asking.get(request)

    @unary
    async def WhoAmI(self, request: pb.WhoAmIRequest, context: Context) -> pb.WhoAmIResponse:
        identity = caller(context, pki.Role.OPERATOR)
        role = identity.operator_role or OperatorRole.VIEWER
        return pb.WhoAmIResponse(name=identity.name, role=role.value, may_call=may_call(role))

    @unary
    async def ListAudit(
        self, request: pb.ListAuditRequest, context: Context
    ) -> pb.ListAuditResponse:
        entries, head, broken = await self._parts.thread.call(
            self._governance.audit, request.since_unix_s, request.after_seq, request.limit
        )
        return pb.ListAuditResponse(
            entries=map(audit_message, entries),
            head=pb.AuditHead(seq=head.seq, hash=head.hash),
            broken=broken,
        )

    @unary
    async def ApproveRollout(
        self, request: pb.RolloutActionRequest, context: Context
    ) -> pb.Rollout:
        by = caller(context, pki.Role.OPERATOR).name
        await self._parts.thread.call(self._governance.approve, request.rollout_id, by)
        self._parts.on_news()
        return await self._rollout(request.rollout_id)

    @unary
    async def RolloutHistory(
        self, request: pb.RolloutHistoryRequest, context: Context
    ) -> pb.ListEventsResponse:
        events = await self._parts.thread.call(
            self._governance.history, request.rollout_id, MAX_AUDIT_PAGE
        )
        return pb.ListEventsResponse(events=map(wire.event_message, events))

    @unary
    async def DiffReleases(
        self, request: pb.DiffReleasesRequest, context: Context
    ) -> pb.DiffReleasesResponse:
        found = await self._parts.thread.call(
            self._parts.operations.differences, request.before, request.after
        )
        return pb.DiffReleasesResponse(differences=map(wire.difference_message, found))

    @unary
    async def SaveGroup(self, request: pb.SaveGroupRequest, context: Context) -> pb.Group:
        by = caller(context, pki.Role.OPERATOR).name
        made = await self._parts.thread.call(
            self._governance.save_group,
            request.name,
            list(request.device_ids),
            request.selector,
            replace=request.replace,
            by=by,
        )
        for device_id in sorted(self._parts.presence.online(self._parts.clock())):
            self._parts.may_be_late(device_id)
        return group_message(*made)

    @unary
    async def ListGroups(
        self, request: pb.ListGroupsRequest, context: Context
    ) -> pb.ListGroupsResponse:
        found = await self._parts.thread.call(self._governance.groups)
        return pb.ListGroupsResponse(groups=[group_message(*g) for g in found])

    @unary
    async def DeleteGroup(
        self, request: pb.DeleteGroupRequest, context: Context
    ) -> pb.DeleteGroupResponse:
        await self._parts.thread.call(self._governance.delete_group, request.name)
        self._parts.on_news()
        return pb.DeleteGroupResponse()

    @unary
    async def PinDevice(self, request: pb.PinDeviceRequest, context: Context) -> pb.Device:
        by = caller(context, pki.Role.OPERATOR).name
        return self._shown(await self._parts.thread.call(self._pin, request, by))

    def _pin(self, request: pb.PinDeviceRequest, by: str) -> Device:
        if request.unpin:
            return self._governance.unpin(request.device_id)
        return self._governance.pin(request.device_id, request.reason, by)

    @unary
    async def QuarantineDevice(
        self, request: pb.QuarantineDeviceRequest, context: Context
    ) -> pb.Device:
        by = caller(context, pki.Role.OPERATOR).name
        return self._shown(await self._parts.thread.call(self._quarantine, request, by))

    def _quarantine(self, request: pb.QuarantineDeviceRequest, by: str) -> Device:
        if request.lift:
            return self._governance.lift_quarantine(request.device_id)
        return self._governance.quarantine(request.device_id, request.reason, by)

    def _shown(self, device: Device) -> pb.Device:
        """Also wakes the decisions: the device may have been waited for, or may be late now."""
        self._parts.may_be_late(device.device_id)
        return self._device(device, None, {})


def group_message(group: Group, inside: int) -> pb.Group:
    return pb.Group(
        name=group.name,
        device_ids=group.device_ids or (),
        selector=group.selector or "",
        created_at_unix_s=group.created_at,
        created_by=group.created_by,
        matching=inside,
    )


def audit_message(entry: AuditEntry) -> pb.AuditEntry:
    draft = entry.draft
    return pb.AuditEntry(
        seq=entry.seq,
        at_unix_s=draft.at,
        who=draft.who,
        role=draft.role,
        where=draft.where,
        what=draft.what,
        detail_json=draft.detail_json,
        answers=draft.answers or 0,
        result=draft.result,
        message=draft.message,
        hash=entry.hash,
    )
