"""Layers after fusion: an inspector's answer as documented, and a real module without a GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from remora_agent.engine.trt.inspector import (
    AT_LOAD,
    Fused,
    counted,
    engine_layers,
    fused_layers,
)
from remora_agent.engine.trt.module import TrtModule, api_of, load_module


def _layer(kind: str, form: str) -> dict[str, object]:
    return {"Name": "n", "LayerType": kind, "Outputs": [{"Name": "o", "Format/Datatype": form}]}


def _module(answer: str | None) -> SimpleNamespace:
    """As much of `tensorrt` as an inspection calls; None: an engine that is not deserialised."""
    inspector = SimpleNamespace(get_engine_information=lambda form: {"json": answer}[form])
    engine = SimpleNamespace(create_engine_inspector=lambda: inspector)
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan: answer and engine)

    class Logger:
        WARNING = 2

        def __init__(self, severity: int) -> None:
            assert severity == self.WARNING

    return SimpleNamespace(
        Logger=Logger,
        Runtime=lambda logger: runtime,
        LayerInformationFormat=SimpleNamespace(JSON="json"),
    )


def test_layers_are_counted_by_kind_and_precision():
    half = _layer("gemm", "Row major linear FP16 format")
    layers = [half, half, _layer("kgen", "Float"), _layer("kgen", "new"), "a name"]
    found = engine_layers(_module(json.dumps({"Layers": layers, "Bindings": []})), b"plan")
    assert counted(found) == {"gemm FP16": 2, "kgen FP32": 1, "kgen": 1, "named only": 1}


def test_a_large_engine_is_told_in_bounded_size():
    told = counted([_layer(f"kind{i}", "FP16") for i in range(1000)])
    assert len(told) == 65
    assert sum(told.values()) == 1000


@pytest.mark.parametrize("answer", [None, "{}", "no JSON", "[]"])
def test_an_answer_that_is_not_understood_is_an_error(answer: str | None):
    with pytest.raises(ValueError):
        engine_layers(_module(answer), b"plan")


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
def test_an_engine_that_cannot_be_inspected_is_told_not_raised(tmp_path: Path):
    module = load_module("tensorrt_rtx")
    plan = tmp_path / "engine.plan"
    plan.write_bytes(b"no engine")
    assert fused_layers(module, plan) == Fused(not_told=AT_LOAD)
    here = replace(module, api=replace(module.api, portable=False))
    why = "the engine cannot be deserialised on this machine"
    assert fused_layers(here, plan) == Fused(not_told=why)


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("kill -SEGV $$", Fused(not_told="the inspection ended by signal 11")),
        ("exit 0", Fused(not_told="the inspection says nothing")),
        ("echo loading; echo '{\"gemm FP16\": 2}'", Fused({"gemm FP16": 2})),
    ],
)
def test_whatever_becomes_of_the_inspecting_process_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, told: Fused
):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr("remora_agent.engine.trt.inspector.sys.executable", str(python))
    module = TrtModule("tensorrt", ModuleType("tensorrt"), "10.3", api_of("tensorrt", "10.3"))
    assert fused_layers(module, tmp_path / "engine.plan") == told
