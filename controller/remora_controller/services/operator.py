"""The operator's calls. Every method: who is it, then one operation on the store's thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import get_args

from remora_contract.artifact import Kind
from remora_contract.errors import RequestInvalid
from remora_controller import pki
from remora_controller.domain import Assignment, Device
from remora_controller.notes import device_note, replacements
from remora_controller.operations import Operations, StartRequest
from remora_controller.presence import Presence
from remora_controller.repository import Repository
from remora_controller.services import operator_wire as wire
from remora_controller.services.calls import Context, caller, unary
from remora_controller.store.late import LateFlag
from remora_controller.store.protocol import Store
from remora_controller.store_thread import StoreThread
from remora_controller.transitions import Request
from remora_controller.watchers import Watchers
from remora_protos.operator.v1 import operator_pb2 as pb
from remora_protos.operator.v1 import operator_pb2_grpc as pb_grpc

MAX_EVENTS = 1000
DEFAULT_EVENTS = 100
MAX_RELEASE_BYTES = 1 << 20
DEFAULT_TOKEN_LIFE_S = 3600.0


@dataclass(frozen=True)
class OperatorParts:
    """What the service works with; made by the composition root."""

    operations: Operations
    store: Store
    thread: StoreThread
    presence: Presence
    repository: Repository
    watchers: Watchers
    authority: pki.Authority
    clock: Callable[[], float]
    on_news: Callable[[], None]
    may_be_late: Callable[[str], None]  # a device that may have missed a rollout


class OperatorService(pb_grpc.OperatorServicer):
    def __init__(self, parts: OperatorParts) -> None:
        self._parts = parts

    @unary
    async def CreateJoinToken(
        self, request: pb.CreateJoinTokenRequest, context: Context
    ) -> pb.CreateJoinTokenResponse:
        by = caller(context, pki.Role.OPERATOR).name
        token, expires_at = await self._parts.thread.call(
            self._parts.operations.create_token,
            dict(request.labels),
            request.valid_for_s or DEFAULT_TOKEN_LIFE_S,
            self._parts.authority.der_sha256,
            by,
        )
        return pb.CreateJoinTokenResponse(token=token.encode(), expires_at_unix_s=expires_at)

    @unary
    async def ListDevices(
        self, request: pb.ListDevicesRequest, context: Context
    ) -> pb.ListDevicesResponse:
        caller(context, pki.Role.OPERATOR)
        devices = await self._parts.thread.call(self._all_devices, request.selector)
        return pb.ListDevicesResponse(devices=devices)

    def _all_devices(self, selector: str) -> list[pb.Device]:
        """Also the removed ones that still call: somebody has to see to them."""
        away = self._parts.presence.turned_away(self._parts.clock())
        removed = self._parts.operations.removed(selector, away)
        messages = [
            wire.device_message(d, None, away[d.device_id], False, device_note(d, {}))
            for d in removed
        ]
        return [*self._devices(selector), *messages]

    def _devices(self, selector: str) -> list[pb.Device]:
        found = self._parts.operations.devices(selector)
        assignments = self._parts.store.assignments()
        replaced = replacements(self._parts.store.devices(), self._parts.presence.sightings())
        flags = {f.device_id: f for f in self._parts.store.late_flags()}
        return [
            self._device(d, assignments.get(d.device_id), replaced, flags.get(d.device_id))
            for d in found
        ]

    def _device(
        self,
        device: Device,
        assignment: Assignment | None,
        replaced: Mapping[str, str],
        late: LateFlag | None = None,
    ) -> pb.Device:
        presence = self._parts.presence
        seen = presence.last_seen(device.device_id)
        is_online = presence.is_online(device.device_id, self._parts.clock())
        note = device_note(device, replaced, late)
        return wire.device_message(device, assignment, seen, is_online, note)

    @unary
    async def LabelDevice(self, request: pb.LabelDeviceRequest, context: Context) -> pb.Device:
        caller(context, pki.Role.OPERATOR)
        device = await self._parts.thread.call(
            self._parts.operations.label,
            request.device_id,
            dict(request.set),
            list(request.remove),
        )
        self._parts.may_be_late(device.device_id)
        self._parts.watchers.nudge(device.device_id)  # its maintenance windows hold at once
        assignment = await self._parts.thread.call(self._parts.store.assignment, device.device_id)
        return self._device(device, assignment, {})

    @unary
    async def RemoveDevice(
        self, request: pb.RemoveDeviceRequest, context: Context
    ) -> pb.RemoveDeviceResponse:
        caller(context, pki.Role.OPERATOR)
        await self._parts.thread.call(self._parts.operations.remove_device, request.device_id)
        self._parts.watchers.end(request.device_id)
        self._parts.on_news()
        return pb.RemoveDeviceResponse()

    @unary
    async def ListArtifacts(
        self, request: pb.ListArtifactsRequest, context: Context
    ) -> pb.ListArtifactsResponse:
        caller(context, pki.Role.OPERATOR)
        if request.kind not in ("", *get_args(Kind)):
            raise RequestInvalid(
                f"artifacts are bundles, adapters and engines, not {request.kind[:40]!r}"
            )
        index = await self._parts.thread.call(self._parts.repository.index, is_fresh=True)
        wanted = [p for p in index.published if request.kind in ("", p.kind)]
        return pb.ListArtifactsResponse(artifacts=map(wire.artifact_message, wanted))

    @unary
    async def CreateRelease(
        self, request: pb.CreateReleaseRequest, context: Context
    ) -> pb.ReleaseInfo:
        by = caller(context, pki.Role.OPERATOR).name
        if len(request.release_json) > MAX_RELEASE_BYTES:
            raise RequestInvalid(f"a release has at most {MAX_RELEASE_BYTES} bytes")
        operations = self._parts.operations
        record = await self._parts.thread.call(operations.create_release, request.release_json, by)
        return wire.release_message(record)

    @unary
    async def ListReleases(
        self, request: pb.ListReleasesRequest, context: Context
    ) -> pb.ListReleasesResponse:
        caller(context, pki.Role.OPERATOR)
        releases = await self._parts.thread.call(self._parts.store.releases)
        return pb.ListReleasesResponse(releases=map(wire.release_message, releases))

    @unary
    async def Plan(self, request: pb.PlanRequest, context: Context) -> pb.PlanResponse:
        caller(context, pki.Role.OPERATOR)
        operations, spec = self._parts.operations, wire.spec_of(request.spec)
        if request.release and request.release_json:
            raise RequestInvalid("a plan is of `release` or of `release_json`, not of both")
        if request.release_json:
            args = request.release_json, request.selector, spec
            plan = await self._parts.thread.call(operations.plan_document, *args)
        else:
            named = request.release, request.selector, spec
            plan = await self._parts.thread.call(operations.plan, *named)
        return wire.plan_message(plan, operations.sharing)

    @unary
    async def StartRollout(self, request: pb.StartRolloutRequest, context: Context) -> pb.Rollout:
        by = caller(context, pki.Role.OPERATOR).name
        start = StartRequest(
            request.release,
            request.selector,
            wire.spec_of(request.spec),
            request.skip_refused,
            request.supersede,
            request.needs_approval,
        )
        detail = await self._parts.thread.call(self._parts.operations.start, start, by)
        self._parts.on_news()
        return wire.rollout_message(detail, self._parts.clock())

    @unary
    async def GetRollout(self, request: pb.GetRolloutRequest, context: Context) -> pb.Rollout:
        caller(context, pki.Role.OPERATOR)
        return await self._rollout(request.rollout_id)

    async def _rollout(self, rollout_id: str) -> pb.Rollout:
        detail = await self._parts.thread.call(self._parts.operations.rollout, rollout_id)
        return wire.rollout_message(detail, self._parts.clock())

    @unary
    async def ListRollouts(
        self, request: pb.ListRolloutsRequest, context: Context
    ) -> pb.ListRolloutsResponse:
        caller(context, pki.Role.OPERATOR)
        rollouts = await self._parts.thread.call(self._rollouts)
        return pb.ListRolloutsResponse(rollouts=rollouts)

    def _rollouts(self) -> list[pb.Rollout]:
        names = {r.release_id: r.name for r in self._parts.store.releases()}
        records = self._parts.store.rollouts()
        return [wire.rollout_summary(r, names.get(r.release_id, "")) for r in records]

    @unary
    async def PauseRollout(self, request: pb.RolloutActionRequest, context: Context) -> pb.Rollout:
        return await self._request(context, request.rollout_id, Request.PAUSE)

    @unary
    async def ResumeRollout(self, request: pb.RolloutActionRequest, context: Context) -> pb.Rollout:
        accept = request.accept_gates
        return await self._request(context, request.rollout_id, Request.RESUME, accept_gates=accept)

    @unary
    async def AbortRollout(self, request: pb.AbortRolloutRequest, context: Context) -> pb.Rollout:
        return await self._request(context, request.rollout_id, Request.ABORT, keep=request.keep)

    @unary
    async def RetryRollout(self, request: pb.RetryRolloutRequest, context: Context) -> pb.Rollout:
        by = caller(context, pki.Role.OPERATOR).name
        detail = await self._parts.thread.call(
            self._parts.operations.retry,
            request.rollout_id,
            by,
            skip_refused=request.skip_refused,
            supersede=request.supersede,
        )
        self._parts.on_news()
        return wire.rollout_message(detail, self._parts.clock())

    async def _request(
        self,
        context: Context,
        rollout_id: str,
        request: Request,
        *,
        keep: bool = False,
        accept_gates: bool = False,
    ) -> pb.Rollout:
        by = caller(context, pki.Role.OPERATOR).name
        operations = self._parts.operations
        await self._parts.thread.call(
            operations.request, rollout_id, request, by, keep=keep, accept_gates=accept_gates
        )
        self._parts.on_news()
        return await self._rollout(rollout_id)

    @unary
    async def Top(self, request: pb.TopRequest, context: Context) -> pb.TopResponse:
        caller(context, pki.Role.OPERATOR)
        devices = await self._parts.thread.call(self._devices, request.selector)
        metrics = self._parts.presence.metrics
        return pb.TopResponse(rows=[wire.top_row(d, metrics(d.device_id)) for d in devices])

    @unary
    async def ListEvents(
        self, request: pb.ListEventsRequest, context: Context
    ) -> pb.ListEventsResponse:
        caller(context, pki.Role.OPERATOR)
        limit = min(request.limit or DEFAULT_EVENTS, MAX_EVENTS)
        operations = self._parts.operations
        events = await self._parts.thread.call(operations.events, request.device_id or None, limit)
        return pb.ListEventsResponse(events=map(wire.event_message, events))
