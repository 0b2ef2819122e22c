"""Which role may make which of the operator's calls: one table, asked before every call. Changes
are written to the audit log before they happen, and what came of them after.

A call that is not in the table is refused: whoever adds one has to say who may make it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import grpc
from google.protobuf import json_format
from google.protobuf.message import Message

from remora_contract.errors import Exhausted, Forbidden, RemoraError
from remora_controller import pki
from remora_controller.audit import MAX_MESSAGE, AuditDraft, AuditEntry, concluded
from remora_controller.audited import result_lost
from remora_controller.pki import Identity, OperatorRole
from remora_controller.services.calls import Context, abort, caller
from remora_controller.store.protocol import Store
from remora_controller.store_thread import StoreThread
from remora_protos.operator.v1 import operator_pb2 as pb

MAX_DETAIL = 4096
DENIED_EVERY_S = 60.0  # the same refusal is written once in this time
_PREFIX = f"/{pb.DESCRIPTOR.services_by_name['Operator'].full_name}/"
_R = OperatorRole
Handler = Callable[[Any, Context], Awaitable[Any]]


@dataclass(frozen=True)
class Permission:
    """Who may make a call, and whether it changes anything: then it is audited."""

    roles: frozenset[OperatorRole]
    is_change: bool


_READ = Permission(frozenset(OperatorRole), is_change=False)
_REVIEW = Permission(frozenset({_R.APPROVER, _R.ADMIN}), is_change=False)
_CHANGE = Permission(frozenset({_R.OPERATOR, _R.ADMIN}), is_change=True)
_READ_DEVICE = Permission(frozenset({_R.OPERATOR, _R.ADMIN}), is_change=False)
_STOP = Permission(frozenset({_R.OPERATOR, _R.APPROVER, _R.ADMIN}), is_change=True)
_APPROVE = Permission(frozenset({_R.APPROVER, _R.ADMIN}), is_change=True)
PERMISSIONS: dict[str, Permission] = {
    "WhoAmI": _READ,
    "ListDevices": _READ,
    "ListGroups": _READ,
    "ListArtifacts": _READ,
    "ListReleases": _READ,
    "DiffReleases": _READ,
    "Plan": _READ,
    "GetRollout": _READ,
    "ListRollouts": _READ,
    "RolloutHistory": _READ,
    "Top": _READ,
    "ListEvents": _READ,
    "ListSharedEngines": _READ,
    "ListExperiments": _READ,
    "PlanPromotion": _READ,
    "ListAudit": _REVIEW,
    "AskDevice": _CHANGE,  # changes nothing; whose log was read is written down
    "GetAnswer": _READ_DEVICE,
    "CreateJoinToken": _CHANGE,
    "LabelDevice": _CHANGE,
    "PinDevice": _CHANGE,
    "QuarantineDevice": _CHANGE,
    "RemoveDevice": _CHANGE,
    "SaveGroup": _CHANGE,
    "DeleteGroup": _CHANGE,
    "RemoveSharedEngine": _CHANGE,
    "CreateRelease": _CHANGE,
    "StartRollout": _CHANGE,
    "PromoteExperiment": _CHANGE,
    "RetryRollout": _CHANGE,
    "ResumeRollout": _CHANGE,
    "PauseRollout": _STOP,
    "AbortRollout": _STOP,
    "ApproveRollout": _APPROVE,
}


def check_permission(identity: Identity, call: str) -> Permission:
    """Raises Forbidden naming who may."""
    permission = PERMISSIONS.get(call)
    if permission is None:
        raise Forbidden(f"no role may call {call}: it is missing in the table of permissions")
    if identity.operator_role not in permission.roles:
        have = identity.operator_role.value if identity.operator_role else "none"
        need = " or ".join(sorted(r.value for r in permission.roles))
        raise Forbidden(
            f"{identity.name} has the role {have}; {call} needs {need} (`remora whoami` shows what "
            "a role may do; `remora-controller operator add` makes credentials)"
        )
    return permission


def may_call(role: OperatorRole) -> list[str]:
    return [call for call, permission in PERMISSIONS.items() if role in permission.roles]


class AccessInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc is untyped
    """Around every operator call. Calls of devices pass through."""

    def __init__(self, store: Store, thread: StoreThread, clock: Callable[[], float]) -> None:
        self._store = store
        self._thread = thread
        self._clock = clock
        self._denied: dict[tuple[str, str], float] = {}  # operators x calls: bounded

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(_PREFIX):
            return handler
        if handler.unary_unary is None:
            return None  # a stream would pass unseen: answered as if it were not there
        return grpc.unary_unary_rpc_method_handler(
            self._guarded(method.removeprefix(_PREFIX), handler.unary_unary),
            handler.request_deserializer,
            handler.response_serializer,
        )

    def _guarded(self, call: str, handle: Handler) -> Handler:
        async def guarded(request: Any, context: Context) -> Any:
            try:
                identity = caller(context, pki.Role.OPERATOR)
                permission = await self._permitted(identity, call, request, context)
                if permission.is_change:
                    asked = await self._append(_asked(identity, call, request, context))
            except RemoraError as e:
                await abort(context, e)
            if not permission.is_change:
                return await handle(request, context)
            return await self._audited(asked, handle, request, context)

        return guarded

    async def _permitted(
        self, identity: Identity, call: str, request: Message, context: Context
    ) -> Permission:
        """Raises Forbidden; a change that was refused is written down."""
        try:
            if await self._thread.call(self._store.is_revoked, identity.name):
                raise Forbidden(f"the credentials of {identity.name} were revoked")
            return check_permission(identity, call)
        except Forbidden as e:
            known = PERMISSIONS.get(call)
            key, now = (identity.name, call), self._clock()
            is_news = now - self._denied.get(key, -DENIED_EVERY_S) >= DENIED_EVERY_S
            if known is not None and known.is_change and is_news:
                self._denied[key] = now
                asked = _asked(identity, call, request, context)
                denied = replace(asked, result="PERMISSION_DENIED", message=str(e)[:MAX_MESSAGE])
                await self._append(denied)
            raise

    async def _audited(
        self, asked: AuditEntry, handle: Handler, request: Message, context: Context
    ) -> Any:
        is_done = False
        try:
            answer = await handle(request, context)
            is_done = True
            return answer
        finally:
            code = "OK" if is_done else _code_name(context)
            message = "" if is_done else str(context.details() or "")
            await self._conclude(asked, code, message)

    async def _conclude(self, asked: AuditEntry, code: str, message: str) -> None:
        try:
            await self._append(concluded(asked, 0.0, code, message))
        except Exhausted as e:
            result_lost(asked, code, e)

    async def _append(self, draft: AuditDraft) -> AuditEntry:
        entry = replace(draft, at=self._clock())
        return await self._thread.call(self._store.append_audit, entry)


def _asked(identity: Identity, call: str, request: Message, context: Context) -> AuditDraft:
    role = identity.operator_role.value if identity.operator_role else ""
    where = str(context.peer())
    return AuditDraft(0.0, identity.name, role, where, call, request_detail(request))


def request_detail(request: Message) -> str:
    """What was asked, as JSON; bytes by their digest. Requests carry no secrets."""
    shown = type(request)()
    shown.CopyFrom(request)
    digests: dict[str, object] = {}
    for field, value in request.ListFields():
        if isinstance(value, bytes):
            digests[field.name] = {"sha256": hashlib.sha256(value).hexdigest(), "bytes": len(value)}
            shown.ClearField(field.name)
    known = json_format.MessageToDict(shown, preserving_proto_field_name=True)
    text = json.dumps({**known, **digests}, ensure_ascii=False, sort_keys=True)
    if len(text) <= MAX_DETAIL:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({"left_out": f"{len(text)} characters", "sha256": digest})


def _code_name(context: Context) -> str:
    """Of the status that the handler ended with; CANCELLED when the caller left before."""
    code = context.code()
    names = {status.value[0]: status.name for status in grpc.StatusCode}
    found = names.get(code if isinstance(code, int) else getattr(code, "value", (-1,))[0])
    return found if found not in (None, "OK") else "CANCELLED" if context.cancelled() else "UNKNOWN"
