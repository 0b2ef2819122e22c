"""Changes that are written down before and after, where they are made on the store's thread."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from remora_contract.errors import Exhausted, InternalFault, RemoraError
from remora_controller.audit import AuditDraft, AuditEntry, concluded
from remora_controller.store.protocol import Store

log = logging.getLogger(__name__)


@contextmanager
def audited(store: Store, draft: AuditDraft, clock: Callable[[], float]) -> Iterator[None]:
    """Around the change. Raises Exhausted before it where there is no room to write it down, and
    whatever it raises."""
    asked = store.append_audit(draft)
    try:
        yield
    except BaseException as e:
        code = e.code if isinstance(e, RemoraError) else InternalFault.code
        _conclude(store, asked, clock(), code, str(e))
        raise
    _conclude(store, asked, clock(), "OK", "")


def _conclude(store: Store, asked: AuditEntry, at: float, result: str, message: str) -> None:
    try:
        store.append_audit(concluded(asked, at, result, message))
    except Exhausted as e:
        result_lost(asked, result, e)


def result_lost(asked: AuditEntry, result: str, cause: Exhausted) -> None:
    """What happened is neither undone nor called failed because its result has no room."""
    detail = {"entry": asked.seq, "result": result, "cause": str(cause)}
    log.error("audit.result_lost", extra=detail)
