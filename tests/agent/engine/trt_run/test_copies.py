"""Blocks of the cache to the host and back, in one piece or several."""

from __future__ import annotations

import numpy as np
import pytest

from remora_agent.engine.protocol import KvBlock, RowStep
from remora_agent.engine.trt import kv
from remora_contract.errors import PromptTooLong, RequestInvalid
from tests.agent.engine.portable import Reference
from tests.support.trt_engines import Bench

PROMPT = [3, 4, 5, 6, 7, 80, 11, 12]


@pytest.mark.parametrize("staged", [1, 2000, 4 << 20])
def test_a_prefix_is_copied_to_another_row(
    gpu: Bench, reference: Reference, monkeypatch: pytest.MonkeyPatch, staged: int
):
    monkeypatch.setattr(kv, "STAGED_BYTES", staged)
    engine = gpu.open()
    tokens = np.array(PROMPT, np.int64)
    engine.prefill(1, tokens, 0)
    block = engine.read_kv(1, 0, 6)
    assert block.bytes == 6 * engine.limits.kv_token_bytes
    engine.write_kv(3, 0, block)
    logits = engine.prefill(3, tokens[6:], 6)
    assert np.abs(logits - reference.logits(PROMPT)).max() < 2e-5
    logits = engine.decode([RowStep(1, 9, 8)])[0]
    assert np.abs(logits - reference.logits([*PROMPT, 9])).max() < 2e-5
    engine.close()


def test_what_a_row_does_not_hold_is_neither_read_nor_written(gpu: Bench):
    engine = gpu.open()
    engine.prefill(0, np.array(PROMPT, np.int64), 0)
    block = engine.read_kv(0, 2, 5)
    for start, stop in ((0, 9), (3, 3), (-1, 2)):
        with pytest.raises(RequestInvalid):
            engine.read_kv(0, start, stop)
    with pytest.raises(RequestInvalid, match="gap"):
        engine.write_kv(1, 2, block)
    with pytest.raises(RequestInvalid, match="another engine"):
        engine.write_kv(1, 0, KvBlock(2, block.arrays))
    with pytest.raises(RequestInvalid, match="row 4"):
        engine.read_kv(4, 0, 1)
    engine.prefill(2, np.ones(46, np.int64), 0)
    with pytest.raises(PromptTooLong):
        engine.write_kv(2, 46, block)
    engine.close()
