"""What an operator asks of a device: by the real command, over the real protocol, bounded."""

from __future__ import annotations

import gzip
import json
import threading
from pathlib import Path

import grpc
import pytest

from remora_contract.errors import (
    Conflict,
    DeadlineExceeded,
    Exhausted,
    InternalFault,
    NotFound,
    Refused,
    RequestInvalid,
    UsageWrong,
)
from remora_controller import questions
from remora_controller.operator_cli.asking import unpacked
from remora_controller.operator_cli.doctor import parsed
from remora_controller.operator_cli.logs import span_s
from remora_controller.questions import Answer, Questions
from remora_protos.control.v1 import control_pb2 as control
from remora_protos.control.v1 import diagnostics_pb2 as cp
from remora_protos.control.v1.diagnostics_pb2_grpc import DiagnosticsStub
from tests.controller.harness import SimulatedDevice
from tests.controller.test_cli import Remora

CHECKS = [
    {"name": "disk", "verdict": "ok", "found": "40 GiB free", "next_step": ""},
    {"name": "clock", "verdict": "fail", "found": "1970", "next_step": "set the [red]clock[/]"},
]


@pytest.fixture
def remora(world) -> Remora:
    return Remora(world)


class Answering:
    """A device that watches and answers each question with the same text."""

    def __init__(self, device: SimulatedDevice, text: bytes, error: str = "") -> None:
        self.device, self._text, self._error = device, text, error
        self.asked: list[cp.DiagnosticRequest] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        stub = DiagnosticsStub(self.device.channel)
        while not self.asked:
            for question in self.device.sync().diagnostics:
                self.asked.append(question)
                packed = b"" if self._error else gzip.compress(self._text)
                stub.Deliver(cp.DeliverRequest(id=question.id, gzip=packed, error=self._error))


@pytest.mark.parametrize("path", ["missing/x.jsonl", "."])
def test_a_log_that_could_not_be_written_is_not_asked_for(world, tmp_path, path):
    device = world.device()
    with pytest.raises(Refused, match="cannot be written"):
        Remora(world)("logs", "fetch", device.device_id, "-o", str(tmp_path / path))
    assert Remora(world).json("audit")[-1]["what"] != "AskDevice"


def test_a_devices_log_is_fetched(world, remora: Remora, tmp_path: Path):
    answering = Answering(world.device(), b'{"event": "agent.started"}\n')
    device_id, target = answering.device.device_id, tmp_path / "log"
    remora("logs", "fetch", device_id, "--since", "2h", "--max-bytes", "500", "-o", str(target))
    assert target.read_bytes() == b'{"event": "agent.started"}\n'
    (question,) = answering.asked
    assert (question.kind, question.max_bytes) == ("logs", 500)
    assert question.since_unix_s > 0
    asked = [e for e in remora.json("audit") if e["what"] == "AskDevice"]
    assert device_id in json.dumps(asked), "whose log was read is written down"


def test_a_device_is_checked_from_afar_and_a_failed_check_is_exit_1(world, remora: Remora):
    answering = Answering(world.device(), json.dumps(CHECKS).encode())
    with pytest.raises(AssertionError, match=r"set the \[red\]clock\[/\]"):
        remora("devices", "doctor", answering.device.device_id)


def test_a_reason_for_no_answer_is_the_commands_error(world, remora: Remora):
    answering = Answering(world.device(), b"", "this agent keeps no log")
    with pytest.raises(Refused, match="gives no logs: this agent keeps no log"):
        remora("logs", "fetch", answering.device.device_id)


def test_a_device_that_does_not_answer_is_told_apart_from_one_that_is_away(world, remora: Remora):
    away, silent = world.device(), world.device()
    silent.sync()
    with pytest.raises(DeadlineExceeded, match="is offline and did not come back in 0 s"):
        remora("logs", "fetch", away.device_id, "--wait", "0")
    with pytest.raises(DeadlineExceeded, match="did not answer in 0 s"):
        remora("logs", "fetch", silent.device_id, "--wait", "0")


def test_who_is_not_in_the_fleet_is_not_asked(world, remora: Remora):
    device = world.device()
    with pytest.raises(NotFound, match="no device 'd-none'"):
        remora("logs", "fetch", "d-none")
    remora("devices", "quarantine", device.device_id, "--reason", "test")
    with pytest.raises(Refused, match="quarantined"):
        remora("logs", "fetch", device.device_id)


def test_a_question_pokes_the_device_and_only_it_may_answer(world, remora: Remora):
    asked, other = world.device(), world.device()
    asked.sync()
    poked = threading.Event()
    watch = asked.fleet.Watch(control.WatchRequest())

    def listen() -> None:
        try:
            for _ in watch:
                poked.set()
        except grpc.RpcError:
            return

    threading.Thread(target=listen, daemon=True).start()
    while not poked.wait(0.2):
        with pytest.raises(DeadlineExceeded):
            remora("logs", "fetch", asked.device_id, "--wait", "0")
    question = asked.sync().diagnostics[0]
    assert list(other.sync().diagnostics) == []
    with pytest.raises(grpc.RpcError, match="nobody waits"):
        DiagnosticsStub(other.channel).Deliver(cp.DeliverRequest(id=question.id, error="mine"))
    watch.cancel()


# -- the book of questions --------------------------------------------------------------------

ANSWER = Answer(b"x" * 100, "", False)


def test_questions_and_answers_are_forgotten_in_time():
    book = Questions()
    question = book.ask("d", "logs", 0, 0.0, now=0.0)
    assert book.waiting("d", 3599.0) == [question]
    assert book.waiting("d", 3600.0) == []
    with pytest.raises(NotFound, match="nobody waits"):
        book.answer("d", question.question_id, ANSWER, 3600.0)
    second = book.ask("d", "logs", 0, 0.0, now=4000.0)
    book.answer("d", second.question_id, ANSWER, 4001.0)
    with pytest.raises(Conflict):
        book.answer("d", second.question_id, ANSWER, 4002.0)
    assert book.get(second.question_id, 4600.0).answer == ANSWER
    with pytest.raises(NotFound, match="ask again"):
        book.get(second.question_id, 4601.0)


def test_every_number_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(questions, "MAX_QUESTIONS", 6)
    monkeypatch.setattr(questions, "MAX_ANSWER_BYTES", 100)
    monkeypatch.setattr(questions, "MAX_KEPT_BYTES", 250)
    book = Questions()
    with pytest.raises(RequestInvalid, match="doctor or logs"):
        book.ask("d", "shell", 0, 0.0, 0.0)
    with pytest.raises(RequestInvalid, match="at most"):
        book.ask("d", "logs", questions.MAX_TEXT_BYTES + 1, 0.0, 0.0)
    ids = [book.ask("d", "logs", 0, 0.0, 0.0).question_id for _ in range(4)]
    with pytest.raises(Exhausted, match="wait for d"):
        book.ask("d", "logs", 0, 0.0, 0.0)
    book.ask("e", "logs", 0, 0.0, 0.0)
    book.ask("e", "logs", 0, 0.0, 0.0)
    with pytest.raises(Exhausted, match="6 questions"):
        book.ask("f", "logs", 0, 0.0, 0.0)
    with pytest.raises(RequestInvalid, match="at most 100 bytes"):
        book.answer("d", ids[0], Answer(b"x" * 101, "", False), 1.0)
    for question_id in ids[:3]:
        book.answer("d", question_id, ANSWER, 1.0)
    with pytest.raises(NotFound):
        book.get(ids[0], 1.0)
    assert book.get(ids[2], 1.0).answer == ANSWER, "the oldest answer made room"


# -- what comes back is not trusted -------------------------------------------------------------


def test_an_answer_that_unpacks_to_more_than_was_asked_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("remora_controller.operator_cli.asking.MAX_TEXT_BYTES", 1000)
    assert unpacked(gzip.compress(b"x" * 1000)) == b"x" * 1000
    for bad in (gzip.compress(b"x" * 1001), gzip.compress(b"x" * 500)[:-9], b"no gzip", b""):
        with pytest.raises(InternalFault):
            unpacked(bad)


@pytest.mark.parametrize("text", [b"", b"{}x", b"3", b'[{"name": "disk"}]', b"[" * 100_000])
def test_checks_that_are_none_are_refused(text: bytes):
    with pytest.raises(InternalFault, match="no list of checks"):
        parsed(text)


@pytest.mark.parametrize("text", ["", "h", "5", "5w", "-5m", "1.5h", "five m"])
def test_a_span_is_a_number_and_a_unit(text: str):
    assert span_s("2d") == 172_800.0
    with pytest.raises(UsageWrong, match="for example 30m"):
        span_s(text)
