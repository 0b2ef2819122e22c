"""What operators ask of devices and what devices answer: a fixed list of kinds, in memory, bounded.

A device hears its questions with every Sync until it answers. Nothing outlives the process: whoever
asked waits beside it. Time comes in; belongs to the event loop.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace

from remora_contract.errors import Conflict, Exhausted, NotFound, RequestInvalid

KINDS = ("doctor", "logs")
MAX_TEXT_BYTES = 16 << 20
DEFAULT_TEXT_BYTES = 1 << 20
MAX_ANSWER_BYTES = 6 << 20  # compressed; a message of the fleet's port holds 8 MiB
MAX_KEPT_BYTES = 64 << 20
MAX_QUESTIONS = 256
MAX_OF_DEVICE = 4
UNANSWERED_S = 3600.0
ANSWERED_S = 600.0


@dataclass(frozen=True)
class Answer:
    gzip: bytes
    error: str
    is_cut: bool


@dataclass(frozen=True)
class Question:
    question_id: str
    device_id: str
    kind: str
    max_bytes: int
    since: float
    forget_at: float
    answer: Answer | None = None


class Questions:
    def __init__(self) -> None:
        self._questions: dict[str, Question] = {}  # the oldest first

    def ask(self, device_id: str, kind: str, max_bytes: int, since: float, now: float) -> Question:
        """Raises RequestInvalid, Exhausted."""
        self._forget_old(now)
        if kind not in KINDS:
            raise RequestInvalid(f"a device is asked for {' or '.join(KINDS)}, not {kind[:40]!r}")
        if max_bytes > MAX_TEXT_BYTES:
            raise RequestInvalid(f"a device gives at most {MAX_TEXT_BYTES} bytes at once")
        if len(self.waiting(device_id, now)) >= MAX_OF_DEVICE:
            raise Exhausted(f"{MAX_OF_DEVICE} questions wait for {device_id} already", 10.0)
        if len(self._questions) >= MAX_QUESTIONS:
            raise Exhausted(f"{MAX_QUESTIONS} questions to devices are open", 60.0)
        question = Question(
            f"q-{secrets.token_hex(8)}",
            device_id,
            kind,
            max_bytes or DEFAULT_TEXT_BYTES,
            since,
            now + UNANSWERED_S,
        )
        self._questions[question.question_id] = question
        return question

    def waiting(self, device_id: str, now: float) -> list[Question]:
        """What the device has not answered, the oldest first."""
        return [
            q
            for q in self._questions.values()
            if q.device_id == device_id and q.answer is None and now < q.forget_at
        ]

    def answer(self, device_id: str, question_id: str, answer: Answer, now: float) -> None:
        """Raises NotFound when it was not asked of this device or is too old, Conflict for a second
        answer, RequestInvalid for one that is too large."""
        question = self._questions.get(question_id)
        if question is None or question.device_id != device_id or now >= question.forget_at:
            raise NotFound("nobody waits for this answer any more")
        if question.answer is not None:
            raise Conflict("this was answered before")
        if len(answer.gzip) > MAX_ANSWER_BYTES:
            raise RequestInvalid(f"an answer has at most {MAX_ANSWER_BYTES} bytes, compressed")
        answered = replace(question, forget_at=now + ANSWERED_S, answer=answer)
        self._questions[question_id] = answered
        self._make_room(question_id)

    def get(self, question_id: str, now: float) -> Question:
        """Raises NotFound."""
        question = self._questions.get(question_id)
        if question is None or now >= question.forget_at:
            raise NotFound(
                f"the controller knows no question {question_id[:40]!r} any more: it keeps answers "
                f"for {ANSWERED_S / 60:.0f} minutes, in memory; ask again"
            )
        return question

    def _forget_old(self, now: float) -> None:
        self._questions = {i: q for i, q in self._questions.items() if now < q.forget_at}

    def _make_room(self, newest: str) -> None:
        """The oldest answers go when all together are too much."""
        total = sum(len(q.answer.gzip) for q in self._questions.values() if q.answer is not None)
        for question in list(self._questions.values()):
            if total <= MAX_KEPT_BYTES:
                return
            if question.answer is not None and question.question_id != newest:
                total -= len(question.answer.gzip)
                del self._questions[question.question_id]
