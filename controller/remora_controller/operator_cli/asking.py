"""A question to one device, and the wait for its answer. Knows no kind's meaning."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable

from rich.console import Console

from remora_contract.errors import DeadlineExceeded, InternalFault, Refused
from remora_controller.operator_cli.session import Session
from remora_protos.operator.v1 import operator_pb2 as pb

POLL_S = 0.5
# More than any device is asked for: what claims to unpack to more is no answer.
MAX_TEXT_BYTES = 32 << 20
_GZIP = 16 + zlib.MAX_WBITS


def ask(session: Session, request: pb.AskDeviceRequest, wait_s: float) -> tuple[bytes, bool]:
    """The text, and whether its beginning is left out. Raises DeadlineExceeded when nothing comes
    in time, Refused when the device does not give it, and what the calls raise."""
    answer = session.call(session.stub.AskDevice, request)
    console = Console(stderr=True)
    with console.status(_waiting(answer)):
        if not answer.is_device_online:
            console.print(f"device {answer.device_id} is offline: waiting for it", markup=False)
        answer = _await(answer, lambda: _again(session, answer.id), wait_s)
    if answer.error:
        raise Refused(f"device {answer.device_id} gives no {answer.kind}: {answer.error}")
    return unpacked(answer.gzip), answer.is_cut


def unpacked(data: bytes) -> bytes:
    """Raises InternalFault for what is no gzip or too large."""
    unpacking = zlib.decompressobj(_GZIP)
    try:
        text = unpacking.decompress(data, MAX_TEXT_BYTES)
    except zlib.error as e:
        raise InternalFault(f"the device's answer is damaged: {e}") from e
    if unpacking.unconsumed_tail or not unpacking.eof:
        raise InternalFault("the device's answer is cut short, or larger than anybody asked for")
    return text


def _await(
    answer: pb.DeviceAnswer, again: Callable[[], pb.DeviceAnswer], wait_s: float
) -> pb.DeviceAnswer:
    deadline = time.monotonic() + wait_s
    while not answer.is_answered:
        if time.monotonic() >= deadline:
            raise DeadlineExceeded(_late(answer, wait_s))
        time.sleep(POLL_S)
        answer = again()
    return answer


def _again(session: Session, question_id: str) -> pb.DeviceAnswer:
    answer: pb.DeviceAnswer = session.call(
        session.stub.GetAnswer, pb.GetAnswerRequest(id=question_id)
    )
    return answer


def _waiting(answer: pb.DeviceAnswer) -> str:
    return f"waiting for {answer.kind} of {answer.device_id}"


def _late(answer: pb.DeviceAnswer, wait_s: float) -> str:
    name = answer.device_id
    if not answer.is_device_online:
        return (
            f"device {name} is offline and did not come back in {wait_s:g} s; wait longer (--wait)"
        )
    return (
        f"device {name} did not answer in {wait_s:g} s; wait longer (--wait), or its agent is too "
        "old for this question"
    )
