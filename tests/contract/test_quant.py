"""QuantSpec refuses what no graph means, and names what a device must have."""

from __future__ import annotations

import pytest

from remora_contract.quant import QuantSpec, least_compute_capability


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"kind": "int4"}, "block"),
        ({"kind": "none", "block": 32}, "block"),
        ({"kind": "nvfp4", "block": 32}, "block"),
        ({"kind": "mxfp8"}, "block"),
        ({"kind": "int8", "block": 0}, "block"),
        ({"kind": "int8", "block": 1 << 30}, "block"),
        ({"kind": "int4", "block": 32, "activations": "int8"}, "activations"),
        ({"kind": "int8", "block": 32, "activations": "int8"}, "activations"),
        ({"kind": "int8", "zero_points": True}, "zero points"),
        ({"kind": "none", "prescaled": True}, "prescaled"),
        ({"kind": "none", "plain": ("head",)}, "plain"),
        ({"kind": "int8", "plain": ("layers.1.o", "head")}, "order"),
        ({"kind": "int8", "plain": ("head", "head")}, "order"),
        ({"kind": "int8", "plain": ("layers.0.nonsense",)}, "names no matrix"),
        ({"kind": "int8", "plain": ("layers.01.o",)}, "names no matrix"),
    ],
)
def test_what_means_nothing_is_refused(fields, word):
    with pytest.raises(ValueError, match=word):
        QuantSpec(**fields)


def test_a_matrix_is_quantized_unless_it_is_plain():
    quant = QuantSpec("int8", plain=("head", "layers.3.qkv"))
    assert quant.quantizes("layers.2.qkv") and not quant.quantizes("layers.3.qkv")
    assert not quant.quantizes("head") and not QuantSpec().quantizes("head")


@pytest.mark.parametrize(
    ("quant", "words", "least"),
    [
        (QuantSpec("int4", 64, zero_points=True), "int4 in blocks of 64, zero points", None),
        (
            QuantSpec("int8", activations="int8", prescaled=True),
            "int8 with int8 activations, prescaled",
            None,
        ),
        (QuantSpec("fp8", 128), "fp8 in blocks of 128", 89),
        (QuantSpec("mxfp8", 32), "mxfp8", 89),
        (QuantSpec("nvfp4", 16), "nvfp4", 100),
    ],
)
def test_people_and_devices_are_told(quant, words, least):
    assert quant.describe() == words
    assert least_compute_capability(quant) == least
