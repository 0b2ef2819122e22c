"""A step that the runtime fails in leaves nothing that the next one trips over."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from remora_agent.engine.ort.session import Session
from remora_contract.errors import EngineFault
from tests.agent.engine.conftest import CASES, Bench, Case

PROMPT = np.array([3, 4, 5, 6, 7, 80, 11, 12], np.int64)


class FailingOnce:
    """A session of the runtime whose next run fails, as for want of memory."""

    def __init__(self, session: object) -> None:
        self._session, self._failed = session, False

    def run_with_iobinding(self, binding: object) -> None:
        if not self._failed:
            self._failed = True
            raise RuntimeError("bad allocation")
        self._session.run_with_iobinding(binding)


@pytest.mark.parametrize("asked", ["score", "embed"])
def test_a_row_is_read_in_another_length_after_a_step_that_failed(
    make_bench: Callable[[Case], Bench], asked: str
):
    engine = make_bench(CASES["ort-float32"]).open()
    read, session = getattr(engine, asked), engine._base
    assert isinstance(session, Session)
    wanted = read(1, PROMPT, 0)
    session._session = FailingOnce(session._session)
    with pytest.raises(EngineFault):
        read(1, PROMPT[:3], 0)
    assert np.array_equal(read(1, PROMPT, 0), wanted)
    engine.close()
