"""Arrays for an inserted bank: every tensor of every adapter is bound, or an error names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from remora_build.insert.description import InsertedBank, load_bank
from remora_build.insert.feed import bank_inputs, read_sidecar
from remora_build.insert.inserter import analyse, insert_bank
from remora_contract.errors import (
    AdapterInvalid,
    ArtifactInvalid,
    DocumentInvalid,
    RequestInvalid,
    Unsupported,
)
from remora_contract.targets import AdapterTarget
from tests.support.adapters import write_sidecar
from tests.support.skeleton import HIDDEN, Decoder

Q0, Q1, DOWN1 = AdapterTarget(0, "q"), AdapterTarget(1, "q"), AdapterTarget(1, "down")


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> InsertedBank:
    directory = tmp_path_factory.mktemp("feed")
    onnx.save(Decoder().model(), directory / "model.onnx")
    insert_bank(analyse(directory / "model.onnx"), directory / "out")
    return load_bank(directory / "out")


def factors(rank: int, n: int = HIDDEN, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(HIDDEN, rank)), rng.normal(size=(rank, n))
    return a.astype(np.float32), b.astype(np.float32)


def test_adapters_lie_side_by_side_as_wide_as_their_widest_layer(bank: InsertedBank) -> None:
    first = {Q0: factors(2), Q1: factors(3)}
    second = {Q0: factors(1, seed=1)}
    feed = bank_inputs(bank, [first, second], [[1.0, 0.5], [0.0, 2.0]])

    assert {n: a.shape for n, a in feed.items() if n.endswith(".q")} == {
        "lora_gate.q": (2, 1, 4),
        "lora_a.0.q": (8, 4),
        "lora_b.0.q": (4, 8),
        "lora_a.1.q": (8, 4),
        "lora_b.1.q": (4, 8),
    }
    np.testing.assert_array_equal(feed["lora_gate.q"][:, 0], [[1, 1, 1, 0.5], [0, 0, 0, 2]])
    a, b = feed["lora_a.0.q"], feed["lora_b.0.q"]
    np.testing.assert_allclose(a[:, :3] @ b[:3], np.matmul(*first[Q0]), atol=1e-5)
    np.testing.assert_allclose(a[:, 3:] @ b[3:], np.matmul(*second[Q0]), atol=1e-5)
    np.testing.assert_allclose(feed["lora_a.1.q"][:, 3:], 0)
    assert feed["lora_a.0.down"].shape == (12, 0)


def test_every_input_of_the_bank_is_fed(bank: InsertedBank) -> None:
    names = {g.name for g in bank.gates} | {n for b in bank.branches for n in (b.a, b.b)}
    assert set(bank_inputs(bank, [], [[]])) == names


BAD: dict[str, tuple[dict[AdapterTarget, Any], str]] = {
    "a layer that is not there": ({AdapterTarget(2, "q"): factors(2)}, r"layers\.2\.q, which"),
    "a projection that is not there": ({AdapterTarget(0, "head"): factors(2)}, "changes head"),
    "another width": ({Q0: factors(2, n=9)}, r"layers\.0\.q is \[8, 2\] x \[2, 9\].*8 x 8"),
    "another k": ({DOWN1: factors(2)}, r"12 x 8 in the graph"),
    "ranks apart": ({Q0: (factors(2)[0], factors(3)[1])}, "different ranks"),
    "infinity": ({Q0: (factors(2)[0] * np.float32(np.inf), factors(2)[1])}, "NaN or infinity"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_bound_is_named(case: str, bank: InsertedBank) -> None:
    adapter, message = BAD[case]
    with pytest.raises(AdapterInvalid, match=message):
        bank_inputs(bank, [adapter], [[1.0]])


@pytest.mark.parametrize("weights", [[[1.0, 2.0]], [1.0], [[[1.0]]], [[np.nan]], [[np.inf]]])
def test_weights_are_one_for_each_row_and_adapter(weights: Any, bank: InsertedBank) -> None:
    with pytest.raises(RequestInvalid):
        bank_inputs(bank, [{Q0: factors(2)}], weights)


def test_what_float16_cannot_hold_is_refused(bank: InsertedBank) -> None:
    import dataclasses

    half = tuple(dataclasses.replace(g, dtype="float16") for g in bank.gates)
    half_bank = dataclasses.replace(bank, gates=half)
    large = (factors(2)[0], factors(2)[1] * np.float32(1e6))
    bank_inputs(bank, [{Q0: large}], [[1.0]])
    with pytest.raises(AdapterInvalid, match=r"layers\.0\.q has values that float16 cannot hold"):
        bank_inputs(half_bank, [{Q0: large}], [[1.0]])


@pytest.fixture
def sidecar(tmp_path: Path) -> Path:
    write_sidecar(tmp_path / "adapter", "sha256:" + "0" * 64, {Q0: factors(2)})
    return tmp_path / "adapter"


def test_a_sidecar_is_read_as_it_was_written(sidecar: Path) -> None:
    tensors = read_sidecar(sidecar)
    assert set(tensors) == {Q0}
    np.testing.assert_array_equal(tensors[Q0][0], factors(2)[0])


def test_a_damaged_sidecar_is_refused(sidecar: Path) -> None:
    weights = sidecar / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ArtifactInvalid, match="damaged"):
        read_sidecar(sidecar)


def test_a_tensor_beyond_a_and_b_is_refused_by_its_name(sidecar: Path) -> None:
    import json

    from remora_contract.digests import digest_file

    weights = sidecar / "adapter.safetensors"
    save_file(load_file(weights) | {"layers.0.q.m": np.ones(8, np.float32)}, weights)
    document = json.loads((sidecar / "adapter.json").read_text())
    document["files"][0] |= {"size": weights.stat().st_size, "digest": digest_file(weights)}
    (sidecar / "adapter.json").write_text(json.dumps(document))
    with pytest.raises(AdapterInvalid, match=r"layers\.0\.q\.m, which is no factor"):
        read_sidecar(sidecar)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"invocation_tokens": [5, 6]}, "invocation tokens on"),
        ({"targets": [{"dora": True}]}, "DoRA"),
        ({"targets": [{"bias": True}]}, "has biases"),
    ],
)
def test_an_adapter_that_does_more_than_a_bank_can_is_refused(
    change: dict[str, Any], message: str, sidecar: Path
) -> None:
    import json

    document = json.loads((sidecar / "adapter.json").read_text())
    if "targets" in change:
        document["targets"][0] |= change["targets"][0]
    else:
        document |= change
    (sidecar / "adapter.json").write_text(json.dumps(document))
    with pytest.raises(Unsupported, match=message):
        read_sidecar(sidecar)


def test_a_directory_without_a_description_is_told_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ArtifactInvalid, match="insert-lora"):
        load_bank(tmp_path)
    (tmp_path / "lora.json").write_text("{}")
    with pytest.raises(DocumentInvalid, match="missing key"):
        load_bank(tmp_path)
