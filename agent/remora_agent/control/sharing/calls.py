"""remora.control.v1.EngineSharing as the agent's own values, with errors of Remora's tree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from remora_contract.digests import check_digest
from remora_contract.errors import DocumentInvalid
from remora_protos.control.v1 import sharing_pb2 as pb
from remora_protos.control.v1.sharing_pb2_grpc import EngineSharingStub

_ASK_AGAIN_S = (0.1, 300.0)
_LEASE_S = (0.5, 3600.0)
_MAX_WHY = 256
_CHUNK_TIMEOUT_S = 120.0
_FINISH_TIMEOUT_S = 600.0  # the controller reads the whole engine once


@dataclass(frozen=True)
class ToBuild:
    lease_s: float
    why: str


@dataclass(frozen=True)
class ToFetch:
    digest: str
    bytes: int
    built_by: str


@dataclass(frozen=True)
class ToWait:
    why: str
    ask_again_s: float


@dataclass(frozen=True)
class ToBuildAlone:
    why: str


Claimed = ToBuild | ToFetch | ToWait | ToBuildAlone


class SharingCalls(Protocol):
    """Every call raises a RemoraError; Unavailable when the controller cannot be reached."""

    def claim(self, key_json: bytes) -> Claimed: ...

    def give_up(self, key_digest: str, blames_model: bool, why: str) -> None: ...

    def reject(self, key_digest: str, engine_digest: str, why: str) -> None: ...

    def offer(self, key_digest: str, manifest_json: bytes) -> Sequence[str]:
        """Digests of the chunks that the controller lacks."""
        ...

    def put(self, key_digest: str, chunk_digest: str, data: bytes) -> None: ...

    def finish(self, key_digest: str) -> None: ...


class ErrorsOf(Protocol):
    """Around a call: turns its errors into Remora's."""

    def __call__(self) -> AbstractContextManager[None]: ...


class GrpcSharing:
    """Implements `SharingCalls` on the controller's channel."""

    def __init__(self, stub: EngineSharingStub, errors: ErrorsOf, timeout_s: float) -> None:
        self._stub, self._errors, self._timeout_s = stub, errors, timeout_s

    def claim(self, key_json: bytes) -> Claimed:
        request = pb.ClaimEngineRequest(key_json=key_json)
        with self._errors():
            answer = self._stub.ClaimEngine(request, timeout=self._timeout_s)
        return claimed_from(answer)

    def give_up(self, key_digest: str, blames_model: bool, why: str) -> None:
        request = pb.GiveUpEngineRequest(
            key_digest=key_digest, blames_model=blames_model, why=why[:_MAX_WHY]
        )
        with self._errors():
            self._stub.GiveUpEngine(request, timeout=self._timeout_s)

    def reject(self, key_digest: str, engine_digest: str, why: str) -> None:
        request = pb.RejectEngineRequest(
            key_digest=key_digest, engine_digest=engine_digest, why=why[:_MAX_WHY]
        )
        with self._errors():
            self._stub.RejectEngine(request, timeout=self._timeout_s)

    def offer(self, key_digest: str, manifest_json: bytes) -> Sequence[str]:
        request = pb.OfferEngineRequest(key_digest=key_digest, manifest_json=manifest_json)
        with self._errors():
            answer = self._stub.OfferEngine(request, timeout=_CHUNK_TIMEOUT_S)
        return list(answer.missing_chunks)

    def put(self, key_digest: str, chunk_digest: str, data: bytes) -> None:
        request = pb.PutEngineChunkRequest(
            key_digest=key_digest, chunk_digest=chunk_digest, data=data
        )
        with self._errors():
            self._stub.PutEngineChunk(request, timeout=_CHUNK_TIMEOUT_S)

    def finish(self, key_digest: str) -> None:
        request = pb.FinishEngineRequest(key_digest=key_digest)
        with self._errors():
            self._stub.FinishEngine(request, timeout=_FINISH_TIMEOUT_S)


def claimed_from(answer: pb.ClaimEngineResponse) -> Claimed:
    """Bounded. Raises DocumentInvalid for what no controller sends."""
    what = answer.WhichOneof("answer")
    if what == "build":
        lease_s = _within(answer.build.lease_s, _LEASE_S, "lease_s")
        return ToBuild(lease_s, answer.build.why[:_MAX_WHY])
    if what == "fetch":
        digest = check_digest(answer.fetch.digest, "digest of a shared engine")
        return ToFetch(digest, answer.fetch.bytes, answer.fetch.built_by[:_MAX_WHY])
    if what == "wait":
        again_s = _within(answer.wait.ask_again_s, _ASK_AGAIN_S, "ask_again_s")
        return ToWait(answer.wait.why[:_MAX_WHY], again_s)
    if what == "alone":
        return ToBuildAlone(answer.alone.why[:_MAX_WHY])
    raise DocumentInvalid("the controller's answer about a shared engine says nothing known")


def _within(seconds: float, bounds: tuple[float, float], what: str) -> float:
    if not math.isfinite(seconds):
        raise DocumentInvalid(f"{what} is not finite")
    return min(bounds[1], max(bounds[0], seconds))
