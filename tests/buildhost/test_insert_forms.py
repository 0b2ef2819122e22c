"""A bank joins a projection in whatever form an exporter wrote it: the branch reads the activation
as the model computed it, before any quantizer's scale or rounding, and rows stay apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from remora_build.insert.description import load_bank
from remora_build.insert.feed import bank_inputs
from remora_build.insert.inserter import analyse, insert_bank
from remora_contract.targets import AdapterTarget
from tests.support.foreign import answers, torchscript_export
from tests.support.respell import REFERENCE_ONLY, RUNNABLE, Plain, add_deltas, respell
from tests.support.vendor_ops import reference_answers

WEIGHTS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 2.0]])
TOKENS = np.random.default_rng(5).integers(0, 320, (3, 6))
RANKS = (3, 2)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2: q, k, v with biases, the others without."""
    from tests.support.checkpoints import make_checkpoint

    root = tmp_path_factory.mktemp("forms")
    checkpoint = make_checkpoint(root / "checkpoint", "qwen2", hidden=48, heads=3, kv_heads=1)
    return torchscript_export(checkpoint, root / "model.onnx")


def two_adapters(plain: dict[AdapterTarget, Plain]):
    rng = np.random.default_rng(1)
    return [
        {
            target: (
                rng.normal(0, 0.2, (p.k, rank)).astype(np.float32),
                rng.normal(0, 0.2, (rank, p.n)).astype(np.float32),
            )
            for target, p in plain.items()
        }
        for rank in RANKS
    ]


def with_adapters_stored(model: onnx.ModelProto, plain, adapters) -> onnx.ModelProto:
    """Each row's sum of weight * A B as one more stored matrix beside W."""
    deltas = {}
    for target in plain:
        products = np.stack([a[target][0] @ a[target][1] for a in adapters])
        deltas[target] = np.einsum("ri,ikn->rkn", WEIGHTS, products)
    reference = onnx.ModelProto()
    reference.CopyFrom(model)
    add_deltas(reference, plain, deltas)
    return reference


def inserted(model: onnx.ModelProto, directory: Path):
    path = directory / "model.onnx"
    onnx.save(model, path)
    out = directory / "out"
    insert_bank(analyse(path), out)
    return out, load_bank(out)


@pytest.mark.parametrize("form", RUNNABLE)
def test_every_form_answers_as_the_graph_with_the_adapters_stored(
    form: str, exported: Path, tmp_path: Path
) -> None:
    model = onnx.load(exported)
    plain = respell(model, RUNNABLE[form])
    adapters = two_adapters(plain)

    onnx.save(with_adapters_stored(model, plain, adapters), tmp_path / "reference.onnx")
    want = answers(tmp_path / "reference.onnx", TOKENS)
    out, bank = inserted(model, tmp_path)
    have = answers(out / "model.onnx", TOKENS, bank_inputs(bank, adapters, WEIGHTS))

    assert len(bank.branches) == 14
    np.testing.assert_allclose(have, want, atol=1e-4, rtol=1e-4)
    assert np.abs(have[1] - have[0]).max() > 0.1


@pytest.mark.parametrize("form", REFERENCE_ONLY)
def test_every_vendor_form_answers_as_the_graph_with_the_adapters_stored(
    form: str, exported: Path, tmp_path: Path
) -> None:
    model = onnx.load(exported)
    plain = respell(model, REFERENCE_ONLY[form])
    adapters = two_adapters(plain)

    want = reference_answers(with_adapters_stored(model, plain, adapters), TOKENS, {})
    out, bank = inserted(model, tmp_path)
    have = reference_answers(
        onnx.load(out / "model.onnx"), TOKENS, bank_inputs(bank, adapters, WEIGHTS)
    )

    assert len(bank.branches) == 14
    np.testing.assert_allclose(have, want, atol=1e-4, rtol=1e-4)
    assert np.abs(have[1] - have[0]).max() > 0.1
