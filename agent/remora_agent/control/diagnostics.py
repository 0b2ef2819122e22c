"""Answers to what the controller asks beside reports: a fixed list of kinds, one at a time, on a
thread of their own. Nothing that comes from the controller is run.
"""

from __future__ import annotations

import gzip
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

from remora_agent.config import AgentConfig
from remora_contract.errors import Refused, RemoraError
from remora_protos.control.v1.diagnostics_pb2 import DeliverRequest, DiagnosticRequest

log = logging.getLogger(__name__)
MAX_TEXT_BYTES = 16 << 20
MAX_SENT_BYTES = 6 << 20  # compressed, as the controller takes it
MAX_AT_ONCE = 4
_CHECKS_S = 120.0
_MAX_CHECKS_BYTES = 1 << 20

Kind = Callable[[DiagnosticRequest], bytes]


class Diagnostics:
    """Thread-safe. `deliver` is set before the first Sync."""

    def __init__(self, kinds: Mapping[str, Kind]) -> None:
        self._kinds = kinds
        self._lock = Lock()
        self._open: set[str] = set()  # being answered: Sync repeats a question until it is
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="diagnostics")
        self._is_stopping = False
        self.deliver: Callable[[DeliverRequest], None] = _nowhere

    def take(self, questions: Sequence[DiagnosticRequest]) -> None:
        """Answers those that are new, later."""
        for question in questions:
            with self._lock:
                is_new = question.id not in self._open and len(self._open) < MAX_AT_ONCE
                if not is_new or self._is_stopping:
                    continue
                self._open.add(question.id)
            self._pool.submit(self._answer, question).add_done_callback(_tell_fault)

    def stop(self) -> None:
        """Questions that wait are asked again after the next start."""
        with self._lock:
            self._is_stopping = True
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, question: DiagnosticRequest) -> None:
        try:
            self.deliver(self._made(question))
            log.info("diagnostic.answered", extra={"kind": question.kind, "id": question.id})
        except RemoraError as e:  # asked again with the next Sync, unless nobody waits any more
            log.warning("diagnostic.not_delivered", extra={"id": question.id, "cause": str(e)})
        finally:
            with self._lock:
                self._open.discard(question.id)

    def _made(self, question: DiagnosticRequest) -> DeliverRequest:
        kind = self._kinds.get(question.kind)
        if kind is None:
            known = " and ".join(sorted(self._kinds))
            return _refused(question, f"this agent gives {known}, not {question.kind[:40]!r}")
        try:
            text = kind(question)
        except (RemoraError, OSError, ValueError) as e:  # ValueError: checks that are no JSON
            return _refused(question, f"{type(e).__name__}: {e}")
        most = min(question.max_bytes or MAX_TEXT_BYTES, MAX_TEXT_BYTES)
        return _packed(question.id, text, most)


def _tell_fault(answered: Future[None]) -> None:
    """What no error of ours is would be lost with the future."""
    if not answered.cancelled() and (fault := answered.exception()) is not None:
        log.error("diagnostic.failed", exc_info=fault)


def _nowhere(answer: DeliverRequest) -> None:
    raise Refused("there is no controller yet")


def _refused(question: DiagnosticRequest, why: str) -> DeliverRequest:
    return DeliverRequest(id=question.id, error=why)


def _packed(question_id: str, text: bytes, most: int) -> DeliverRequest:
    """The end of the text, at the beginning of a line, as much as may be sent."""
    whole = len(text)
    text = newest_lines(text, most)
    packed = gzip.compress(text)
    while len(packed) > MAX_SENT_BYTES:
        text = newest_lines(text, len(text) // 2)
        packed = gzip.compress(text)
    return DeliverRequest(id=question_id, gzip=packed, is_cut=len(text) < whole)


def newest_lines(text: bytes, most: int) -> bytes:
    """At most so many bytes from the end, whole lines only."""
    if len(text) <= most:
        return text
    start = len(text) - most
    if text[start - 1 : start] != b"\n":
        start = text.find(b"\n", start) + 1 or len(text)
    return text[start:]


def doctor_report(config: AgentConfig) -> bytes:
    """What `remora-agent doctor --config … --json` prints. The machine is looked at in a process of
    its own, because that loads GPU libraries. Raises Refused."""
    from remora_agent.doctor.check import plain
    from remora_agent.doctor.device import device_checks

    checks = [*_hardware(), *map(plain, device_checks(config))]
    return json.dumps(checks, indent=2).encode()


def _hardware() -> list[dict[str, str]]:
    command = [sys.executable, "-m", "remora_agent", "doctor", "--json"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_CHECKS_S, check=False)
    except subprocess.TimeoutExpired as e:
        raise Refused(f"the machine's checks took longer than {_CHECKS_S:.0f} s") from e
    if done.returncode not in (0, 1) or len(done.stdout) > _MAX_CHECKS_BYTES:
        said = done.stderr[-500:].decode(errors="replace")
        raise Refused(f"the machine's checks ended with status {done.returncode}: {said}")
    found: list[dict[str, str]] = json.loads(done.stdout)
    return found
