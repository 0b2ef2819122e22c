"""What an agent tells of itself when asked: bounded, once; nothing from outside is run."""

from __future__ import annotations

import gzip
import json
import logging
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora_agent.config import AgentConfig
from remora_agent.control import diagnostics
from remora_agent.control.diagnostics import Diagnostics, doctor_report, newest_lines
from remora_agent.control.kept_log import keeping_log, kept_lines
from remora_contract.errors import Refused, Unavailable
from remora_protos.control.v1.diagnostics_pb2 import DeliverRequest, DiagnosticRequest

log = logging.getLogger("remora_agent.test")


@pytest.fixture(autouse=True)
def everything_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def lines_of(path: Path, since: float = 0.0) -> list[dict[str, str]]:
    return [json.loads(line) for line in kept_lines(path, since).splitlines()]


class Delivered:
    def __init__(self) -> None:
        self.all: list[DeliverRequest] = []
        self.came = threading.Semaphore(0)
        self.failures = 0

    def __call__(self, answer: DeliverRequest) -> None:
        try:
            if self.failures:
                self.failures -= 1
                raise Unavailable("the controller is away")
            self.all.append(answer)
        finally:
            self.came.release()

    def next(self) -> None:
        assert self.came.acquire(timeout=30)


def asked(kinds: dict[str, diagnostics.Kind]) -> tuple[Diagnostics, Delivered]:
    made, delivered = Diagnostics(kinds), Delivered()
    made.deliver = delivered
    return made, delivered


# -- the log --------------------------------------------------------------------------------


def test_the_log_is_kept_within_its_bytes_and_the_newest_lines_stay(tmp_path: Path):
    path = tmp_path / "logs" / "agent.jsonl"
    with keeping_log(path, 8_000):
        for i in range(500):
            log.info("line", extra={"number": i})
    found = [line["number"] for line in lines_of(path)]
    assert found == list(range(found[0], 500))
    assert 3_000 < sum(file.stat().st_size for file in path.parent.iterdir()) <= 8_000


def test_what_is_logged_after_the_end_is_not_kept(tmp_path: Path):
    path = tmp_path / "logs" / "agent.jsonl"
    with keeping_log(path, 8_000):
        log.info("inside")
    log.info("outside")
    assert [line["event"] for line in lines_of(path)] == ["inside"]


def test_prompts_and_answers_are_left_out_and_other_handlers_still_get_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = tmp_path / "logs" / "agent.jsonl"
    with keeping_log(path, 8_000):
        log.info("request.ended", extra={"prompt": "my secret", "answer": "yours", "tokens": 3})
    (line,) = lines_of(path)
    assert (line["prompt"], line["answer"], line["tokens"]) == ("(left out)", "(left out)", 3)
    assert "secret" not in path.read_text()
    assert caplog.records[-1].__dict__["prompt"] == "my secret"


def test_only_lines_since_then_are_given(tmp_path: Path):
    path = tmp_path / "agent.jsonl"
    days = ["2026-01-01T00:00:00.000+00:00", "2026-01-02T00:00:00.000+00:00"]
    path.write_text("".join(json.dumps({"at": at, "event": at}) + "\n" for at in days) + "torn\n")
    found = kept_lines(path, 1767312000.0).splitlines()
    assert [b"2026-01-02" in line for line in found] == [True, False]


def test_an_agent_that_keeps_no_log_says_so_and_removes_an_old_one(tmp_path: Path):
    path = tmp_path / "logs" / "agent.jsonl"
    with keeping_log(path, 8_000):
        log.info("line")
    with keeping_log(path, 0):
        log.info("line")
    with pytest.raises(Refused, match="kept_log_bytes"):
        kept_lines(path, 0.0)


def test_a_log_that_cannot_be_written_is_told_once_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "logs" / "agent.jsonl"
    with keeping_log(path, 8_000):
        handler = logging.getLogger().handlers[-1]

        def full(record: logging.LogRecord) -> bool:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(handler, "shouldRollover", full)
        for _ in range(3):
            log.info("line")
    told = [r for r in caplog.records if r.getMessage() == "kept_log.failed"]
    assert len(told) == 1
    assert "No space left" in told[0].__dict__["cause"]


# -- questions ------------------------------------------------------------------------------


def test_a_question_is_answered_once_however_often_it_comes():
    going_on = threading.Event()

    def slow(_: DiagnosticRequest) -> bytes:
        assert going_on.wait(30)
        return b"text\n"

    made, delivered = asked({"logs": slow})
    for _ in range(5):
        made.take([DiagnosticRequest(id="q", kind="logs")])
    going_on.set()
    delivered.next()
    made.stop()
    assert [(a.id, gzip.decompress(a.gzip), a.is_cut) for a in delivered.all] == [
        ("q", b"text\n", False)
    ]


def test_what_could_not_be_delivered_is_answered_when_asked_again():
    made, delivered = asked({"logs": lambda _: b"text\n"})
    delivered.failures = 1
    made.take([DiagnosticRequest(id="q", kind="logs")])
    delivered.next()
    while not delivered.all:
        made.take([DiagnosticRequest(id="q", kind="logs")])
    assert delivered.all[0].id == "q"


def test_what_is_unknown_or_not_there_is_answered_with_the_reason():
    def none(_: DiagnosticRequest) -> bytes:
        raise Refused("this agent keeps no log")

    made, delivered = asked({"logs": none})
    made.take([DiagnosticRequest(id="a", kind="logs")])
    made.take([DiagnosticRequest(id="b", kind="rm -rf /")])
    delivered.next()
    delivered.next()
    errors = {a.id: a.error for a in delivered.all}
    assert errors["a"] == "Refused: this agent keeps no log"
    assert "gives logs" in errors["b"]


def test_checks_that_cannot_be_read_are_answered_with_the_reason():
    made, delivered = asked({"doctor": lambda _: json.dumps(json.loads("no json")).encode()})
    made.take([DiagnosticRequest(id="q", kind="doctor")])
    delivered.next()
    assert delivered.all[0].error.startswith("JSONDecodeError: Expecting value")


def test_a_fault_of_ours_is_logged_and_the_next_question_answered(
    caplog: pytest.LogCaptureFixture,
):
    def broken(_: DiagnosticRequest) -> bytes:
        raise KeyError("a bug")

    made, delivered = asked({"doctor": broken, "logs": lambda _: b"text\n"})
    made.take([DiagnosticRequest(id="a", kind="doctor"), DiagnosticRequest(id="b", kind="logs")])
    delivered.next()
    assert [a.id for a in delivered.all] == ["b"]
    (told,) = [r for r in caplog.records if r.getMessage() == "diagnostic.failed"]
    assert told.exc_info is not None and "a bug" in str(told.exc_info[1])


def test_more_questions_than_are_answered_at_once_wait_for_the_next_sync():
    going_on, made_of = threading.Event(), []

    def slow(question: DiagnosticRequest) -> bytes:
        made_of.append(question.id)
        assert going_on.wait(30)
        return b""

    made, delivered = asked({"logs": slow})
    made.take([DiagnosticRequest(id=str(i), kind="logs") for i in range(50)])
    going_on.set()
    for _ in range(diagnostics.MAX_AT_ONCE):
        delivered.next()
    made.stop()
    assert len(made_of) == diagnostics.MAX_AT_ONCE


@given(
    st.lists(st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"x") + b"\n")), st.integers(0)
)
def test_the_end_of_a_text_is_whole_lines_that_fit(lines: list[bytes], most: int):
    text = b"".join(lines)
    found = newest_lines(text, most)
    assert text.endswith(found)
    assert len(found) <= most
    kept = [line + b"\n" for line in found.split(b"\n")[:-1]]
    assert kept == lines[len(lines) - len(kept) :]
    left_out = lines[: len(lines) - len(kept)]
    assert not left_out or len(found) + len(left_out[-1]) > most


def test_an_answer_that_would_be_too_large_keeps_its_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(diagnostics, "MAX_SENT_BYTES", 200)
    text = b"".join(f"{i} {hash(str(i))}\n".encode() for i in range(200))
    made, delivered = asked({"logs": lambda _: text})
    made.take([DiagnosticRequest(id="q", kind="logs")])
    delivered.next()
    (answer,) = delivered.all
    assert answer.is_cut
    assert len(answer.gzip) <= 200
    assert text.endswith(gzip.decompress(answer.gzip))


def test_the_doctor_looks_at_machine_and_membership(tmp_path: Path):
    checks = json.loads(doctor_report(AgentConfig(state_dir=str(tmp_path))))
    by_name = {c["name"]: c for c in checks}
    assert by_name["memory"]["found"]
    assert by_name["identity"]["verdict"] == "fail"
    assert {"name", "verdict", "found", "next_step"} == set(checks[0])
