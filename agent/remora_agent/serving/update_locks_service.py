"""remora.inference.v1.UpdateLocks: applications ask that the release is not switched now."""

from __future__ import annotations

from typing import Any

from remora_agent.serving.rpc_errors import translated
from remora_agent.serving.wire import refuse_unknown_fields
from remora_agent.update_locks import LockBook, UpdateLock
from remora_contract.errors import Unsupported
from remora_protos.inference.v1 import inference_pb2 as pb
from remora_protos.inference.v1 import inference_pb2_grpc as rpc


class UpdateLocksService(rpc.UpdateLocksServicer):
    """A small file is read and written: nothing here waits."""

    def __init__(self, book: LockBook | None) -> None:
        """None: nobody updates this process (`remora-agent serve`)."""
        self._known = book

    @translated
    async def Lock(self, request: pb.LockUpdatesRequest, context: Any) -> pb.UpdateLockStatus:
        refuse_unknown_fields(request)
        return self._status(self._book.lock(request.owner, request.reason, request.for_s))

    @translated
    async def Unlock(self, request: pb.UnlockUpdatesRequest, context: Any) -> pb.UpdateLockStatus:
        refuse_unknown_fields(request)
        return self._status(self._book.unlock(request.owner))

    @translated
    async def Status(
        self, request: pb.UpdateLockStatusRequest, context: Any
    ) -> pb.UpdateLockStatus:
        refuse_unknown_fields(request)
        return self._status(self._book.locks())

    @property
    def _book(self) -> LockBook:
        if self._known is None:
            raise Unsupported("remora-agent serve is never updated; remora-agent run takes locks")
        return self._known

    def _status(self, locks: tuple[UpdateLock, ...]) -> pb.UpdateLockStatus:
        return pb.UpdateLockStatus(
            locks=[
                pb.UpdateLock(owner=x.owner, reason=x.reason, until_unix_s=x.until_unix_s)
                for x in locks
            ],
            max_lock_s=self._book.max_lock_s,
        )
