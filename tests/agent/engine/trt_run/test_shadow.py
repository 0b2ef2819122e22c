"""A shadow on a TensorRT engine (emulated): its scores and copies of prefixes are what a shadow
needs, and give what the portable graph gives."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from remora_agent.bank.directory import AdapterDirectory, Declared
from remora_agent.bank.weights import load_weights
from remora_agent.runtime.api import AdapterRef
from remora_agent.runtime.model_runtime import ModelRuntime
from remora_agent.serving.call import (
    GenerateCall,
    SamplingOverrides,
    StoppingOverrides,
    TokenPrompt,
)
from remora_agent.serving.experiment_counts import ExperimentCounts
from remora_agent.serving.served_model import ServedModel
from remora_contract.bundle import load_bundle
from remora_contract.experiments import SHADOW_COUNTS, Arm, Experiment, Shadow
from tests.agent.engine.portable import Reference, Weighted
from tests.support.adapters import random_tensors, write_sidecar
from tests.support.runtime import Listener, byte_text
from tests.support.trt_engines import Bench

PROMPT, COUNT = (3, 4, 5, 6, 7, 8, 9), 6


@pytest.fixture
def model(gpu: Bench, trt_bundle: Path, tmp_path: Path) -> Iterator[SimpleNamespace]:
    bundle = load_bundle(trt_bundle)
    directory = AdapterDirectory(bundle)
    for seed, name in enumerate("ab"):
        tensors = random_tensors(bundle.decoder, seed=seed, r=4)
        write_sidecar(tmp_path / name, bundle.base_digest, tensors)
        directory.register(name, "r1", tmp_path / name)
    runtime = ModelRuntime(gpu.open(), bundle, byte_text(), directory)
    counts = ExperimentCounts()
    made = ServedModel(runtime, experiments=counts)
    for name in "ab":
        runtime.adapters.load(name)
    yield SimpleNamespace(runtime=runtime, model=made, counts=counts, directory=directory)
    runtime.close()
    assert gpu.cuda.live == []


def compared(made: SimpleNamespace, candidate: str) -> tuple[dict[str, float], tuple[int, ...]]:
    """One answer of a, compared with the candidate's; the counts and the answer."""
    arms = (Arm("i", 100, adapter="a"), Arm("c", 0, adapter=candidate))
    experiment = Experiment("x", arms, shadow=Shadow("i", "c", 100))
    digests = {n: made.directory.resolve(n, None).digest for n in "ab"}
    mixes = {"i": ((digests["a"], 1.0),), "c": ((digests[candidate], 1.0),)}
    declared = Declared(experiment, {"i": "1", "c": candidate}, mixes)
    made.directory.set_experiments([declared])
    listener = Listener()
    call = GenerateCall(
        TokenPrompt(PROMPT),
        (AdapterRef("x"),),
        SamplingOverrides(temperature=0.0),
        StoppingOverrides(max_tokens=COUNT, ignore_eos=True),
    )
    made.model.submit(f"r-{candidate}", call, PROMPT, None, listener)
    answer = listener.wait(60).tokens
    until = time.monotonic() + 60
    while time.monotonic() < until:
        told = made.counts.metrics([declared])
        found = {n: told[f"shadow_{n}.x/c/{candidate}"] for n in SHADOW_COUNTS}
        if sum(found[n] for n in ("compared", "skipped", "cancelled", "failed")):
            return found, answer
        time.sleep(0.01)
    raise AssertionError("nothing was compared")


def test_the_same_adapter_agrees_with_itself(model: SimpleNamespace) -> None:
    found, _ = compared(model, "a")
    assert found["compared"] == found["exact"] == 1
    assert found["scored_tokens"] == found["agreed_tokens"] == COUNT
    assert found["incumbent_nll"] == pytest.approx(found["candidate_nll"], rel=1e-5)


def test_another_adapter_is_scored_as_the_portable_graph_does(
    model: SimpleNamespace, reference: Reference
) -> None:
    found, answer = compared(model, "b")
    records = {n: model.directory.resolve(n, None) for n in "ab"}
    want = {}
    likeliest = {}
    for name, record in records.items():
        weights = (Weighted(load_weights(record.directory, model.runtime.bundle)),)
        rows = [
            reference.logits([*PROMPT, *answer[:i]], weights).astype(np.float64)
            for i in range(COUNT)
        ]
        likeliest[name] = [int(row.argmax()) for row in rows]
        want[name] = sum(
            float(np.log(np.exp(row - row.max()).sum()) + row.max() - row[token])
            for row, token in zip(rows, answer, strict=True)
        )
    agreed = sum(p == q for p, q in zip(likeliest["a"], likeliest["b"], strict=True))
    assert found["compared"] == 1
    assert (found["scored_tokens"], found["agreed_tokens"]) == (COUNT, agreed)
    assert found["incumbent_nll"] == pytest.approx(want["a"], rel=1e-3)
    assert found["candidate_nll"] == pytest.approx(want["b"], rel=1e-3)
