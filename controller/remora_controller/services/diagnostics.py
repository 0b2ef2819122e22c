"""Questions to devices over the wire: an operator asks, Sync carries them, a device delivers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from remora_contract.errors import NotFound, Refused
from remora_controller import pki
from remora_controller.presence import Presence
from remora_controller.questions import Answer, Question, Questions
from remora_controller.services.admission import Admission
from remora_controller.services.calls import Context, caller, unary
from remora_controller.store.protocol import Store
from remora_controller.store_thread import StoreThread
from remora_controller.watchers import Watchers
from remora_protos.control.v1 import diagnostics_pb2 as cp
from remora_protos.control.v1 import diagnostics_pb2_grpc as cp_grpc
from remora_protos.operator.v1 import operator_pb2 as pb

MAX_ERROR = 2000


class DiagnosticsService(cp_grpc.DiagnosticsServicer):
    """The device's side."""

    def __init__(
        self, questions: Questions, admission: Admission, clock: Callable[[], float]
    ) -> None:
        self._questions = questions
        self._admission = admission
        self._clock = clock

    @unary
    async def Deliver(self, request: cp.DeliverRequest, context: Context) -> cp.DeliverResponse:
        device = await self._admission.known_device(caller(context, pki.Role.DEVICE))
        answer = Answer(request.gzip, request.error[:MAX_ERROR], request.is_cut)
        self._questions.answer(device.device_id, request.id, answer, self._clock())
        return cp.DeliverResponse()


def requests_of(questions: Iterable[Question]) -> list[cp.DiagnosticRequest]:
    return [
        cp.DiagnosticRequest(
            id=q.question_id, kind=q.kind, max_bytes=q.max_bytes, since_unix_s=q.since
        )
        for q in questions
    ]


@dataclass(frozen=True)
class Asking:
    """The operator's side, for the operator service."""

    questions: Questions
    store: Store
    thread: StoreThread
    watchers: Watchers
    presence: Presence
    clock: Callable[[], float]

    async def ask(self, request: pb.AskDeviceRequest) -> pb.DeviceAnswer:
        """Raises NotFound, Refused for a device that is not listened to, RequestInvalid,
        Exhausted."""
        device = await self.thread.call(self.store.device, request.device_id)
        if device is None or device.removed_at is not None:
            raise NotFound(f"no device {request.device_id[:80]!r}; `remora devices` lists them")
        if device.quarantine is not None:
            raise Refused(
                f"device {device.device_id} is quarantined: nothing it says is taken. Lift it with "
                "`remora devices quarantine --lift`, or look at the device itself"
            )
        question = self.questions.ask(
            device.device_id,
            request.kind,
            request.max_bytes,
            request.since_unix_s,
            self.clock(),
        )
        self.watchers.nudge(device.device_id)
        return self._message(question)

    def get(self, request: pb.GetAnswerRequest) -> pb.DeviceAnswer:
        return self._message(self.questions.get(request.id, self.clock()))

    def _message(self, question: Question) -> pb.DeviceAnswer:
        answer = question.answer
        return pb.DeviceAnswer(
            id=question.question_id,
            device_id=question.device_id,
            kind=question.kind,
            is_answered=answer is not None,
            error=answer.error if answer is not None else "",
            gzip=answer.gzip if answer is not None else b"",
            is_cut=answer is not None and answer.is_cut,
            is_device_online=self.presence.is_online(question.device_id, self.clock()),
        )
