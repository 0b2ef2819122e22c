"""A child process tries the engine that will serve, not another one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from remora_agent.engine.one_row import OneRow
from remora_agent.engine.opening import EngineOptions
from remora_contract.digests import canonical_json
from remora_contract.errors import DocumentInvalid, RequestInvalid
from remora_contract.strict import loads


@pytest.mark.parametrize(
    "options",
    [
        EngineOptions(rows=5),
        EngineOptions(rows=5, context=77, threads=3, accuracy_level=1, prefill="plain"),
        EngineOptions(rows=5, context=9, prefill="int8"),
        EngineOptions(rows=5, backend="tensorrt_rtx"),
        EngineOptions(rows=5, backend="tensorrt", context=4, prefill="plain"),
    ],
)
def test_all_but_the_rows_reaches_the_child(options: EngineOptions):
    sent = canonical_json(OneRow.of(options))
    assert loads(OneRow, sent, "sent").options() == replace(options, rows=1)


@pytest.mark.parametrize(
    "sent",
    [
        b'{"accuracy_level":4,"prefill":"auto"}',
        b'{"accuracy_level":4,"prefill":"auto","backend":"onnxruntime","more":1}',
        b'{"accuracy_level":4,"prefill":"auto","backend":"cuda"}',
        b'{"accuracy_level":4,"prefill":"fast","backend":"onnxruntime"}',
    ],
)
def test_what_cannot_be_meant_is_refused(sent: bytes):
    with pytest.raises((DocumentInvalid, RequestInvalid)):
        loads(OneRow, sent, "sent").options()
