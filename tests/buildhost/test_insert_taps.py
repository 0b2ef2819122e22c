"""Where a branch joins: the value it reads and the one it is added to, whatever axes and scales lie
around the projection; and what stays unclear is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from remora_build.insert.description import InsertedBank, load_bank
from remora_build.insert.feed import bank_inputs
from remora_build.insert.inserter import analyse, insert_bank
from remora_contract.errors import InvalidInput, Unsupported
from remora_contract.targets import AdapterTarget
from tests.support.skeleton import HIDDEN, WIDE, Decoder, answer, named

_RNG = np.random.default_rng(2)
ADAPTER = {
    AdapterTarget(layer, p): (  # type: ignore[arg-type]
        _RNG.normal(0, 0.3, (k, 2)).astype(np.float32),
        _RNG.normal(0, 0.3, (2, n)).astype(np.float32),
    )
    for layer in range(2)
    for p, (k, n) in {
        "q": (HIDDEN, HIDDEN),
        "o": (HIDDEN, HIDDEN),
        "gate": (HIDDEN, WIDE),
        "down": (WIDE, HIDDEN),
    }.items()
}


def inserted(decoder: Decoder, directory: Path) -> tuple[Path, InsertedBank]:
    onnx.save(decoder.model(), directory / "model.onnx")
    insert_bank(analyse(directory / "model.onnx"), directory / "out")
    return directory / "out" / "model.onnx", load_bank(directory / "out")


def shape(decoder: Decoder, *dims: int) -> str:
    return decoder.const(np.array(dims, np.int64))


def int8(decoder: Decoder, x: str) -> str:
    """Rounded to multiples of 0.001: as good as not at all."""
    inputs = [decoder.const(np.float32(0.001)), decoder.const(np.int16(0))]
    return decoder.op("DequantizeLinear", decoder.op("QuantizeLinear", x, *inputs), *inputs)


def quantized_by_heads(d: Decoder, path: str, x: str, k: int, n: int) -> str | None:
    """o reads [b, s, k]; the quantizer stands before, where the heads are apart."""
    if not path.endswith("o_proj"):
        return None
    heads = int8(d, d.op("Reshape", x, shape(d, 0, 0, 2, k // 2)))
    return d.matmul(path, d.op("Reshape", heads, shape(d, 0, 0, k)), k, n)


def flattened_from_heads(d: Decoder, path: str, x: str, k: int, n: int) -> str | None:
    """o is a product of [b * s, k], reshaped straight from [b, s, heads, head]."""
    if not path.endswith("o_proj"):
        return None
    heads = d.op("Identity", d.op("Reshape", x, shape(d, 0, 0, 2, k // 2)))
    flat = d.matmul(path, d.op("Reshape", heads, shape(d, -1, k)), k, n)
    size = d.op("Shape", x, start=0, end=2)
    return d.op("Reshape", flat, d.op("Concat", size, shape(d, n), axis=0))


def result_quantized(d: Decoder, path: str, x: str, k: int, n: int) -> str | None:
    """The result's range was measured without adapters: here it would clip them away."""
    if not path.endswith("gate_proj"):
        return None
    bias = d.const(np.zeros(n, np.float32))
    return int8(d, d.op("Add", bias, d.matmul(path, x, k, n)))


@pytest.mark.parametrize("around", [quantized_by_heads, flattened_from_heads, result_quantized])
def test_rows_stay_apart_whatever_the_axes(around: Any, tmp_path: Path) -> None:
    """Against the plain graph, which other tests hold against transformers and peft."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "spelled").mkdir()
    x = np.random.default_rng(4).normal(size=(3, 4, HIDDEN)).astype(np.float32)
    weights = [[0.0], [1.0], [-2.0]]
    answers = []
    for name, decoder in (("plain", Decoder()), ("spelled", Decoder(around))):
        path, bank = inserted(decoder, tmp_path / name)
        answers.append(answer(path, {"x": x, **bank_inputs(bank, [ADAPTER], weights)}))
    np.testing.assert_allclose(answers[1], answers[0], atol=5e-3)
    base = answer(tmp_path / "spelled" / "model.onnx", {"x": x})
    np.testing.assert_allclose(answers[1][0], base[0], atol=1e-6)
    assert np.abs(answers[1][1:] - base[1:]).max() > 0.1


def test_a_branch_is_added_after_bias_and_quantization_of_the_result(tmp_path: Path) -> None:
    path, _ = inserted(Decoder(result_quantized), tmp_path)
    model = onnx.load(path)
    added = named(model, "layers.0.gate.adapted")
    base = next(n for n in model.graph.node if added.input[0] in n.output)
    assert base.op_type == "DequantizeLinear"


def test_a_graph_without_a_batch_axis_has_a_gate_for_each_token(tmp_path: Path) -> None:
    path, bank = inserted(Decoder(axes=["tokens"]), tmp_path)
    assert {g.rows for g in bank.gates} == {"tokens"}
    x = np.random.default_rng(4).normal(size=(3, HIDDEN)).astype(np.float32)
    # Attention mixes tokens; the gate projection of the first layer does not: look there.
    model = onnx.load(path)
    inner = named(model, "layers.0.gate.adapted").output[0]
    model.graph.output.append(helper.make_tensor_value_info(inner, 1, None))
    onnx.save(model, path)
    only = {t: ab for t, ab in ADAPTER.items() if t.projection == "gate"}

    def gate_values(weights: list[list[float]]) -> np.ndarray:
        import onnxruntime as ort

        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return session.run([inner], {"x": x, **bank_inputs(bank, [only], weights)})[0]

    base, all_tokens = gate_values([[0.0]]), gate_values([[1.0]])
    mixed = gate_values([[0.0], [1.0], [3.0]])
    np.testing.assert_allclose(mixed[0], base[0], atol=1e-6)
    np.testing.assert_allclose(mixed[1], all_tokens[1], atol=1e-6)
    np.testing.assert_allclose(mixed[2] - base[2], 3 * (all_tokens[2] - base[2]), atol=1e-4)


def test_positions_before_rows_are_refused(tmp_path: Path) -> None:
    model = Decoder(axes=["sequence", "batch"]).model()
    ids = helper.make_tensor_value_info("input_ids", 7, ["batch", "sequence"])
    model.graph.input.append(ids)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(Unsupported, match="positions before rows"):
        insert_bank(analyse(tmp_path / "model.onnx"), tmp_path / "out")


def test_four_axes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="has 4 axes; 2 or 3 are understood"):
        inserted(Decoder(axes=["batch", "beams", "sequence"]), tmp_path)


@pytest.mark.parametrize(("kind", "name"), [(16, "bfloat16"), (10, "float16"), (1, "float32")])
def test_factors_have_the_type_of_the_activations(kind: int, name: str, tmp_path: Path) -> None:
    model = Decoder().model()
    for tensor in model.graph.initializer:
        values = np.frombuffer(tensor.raw_data, np.float32)
        tensor.CopyFrom(helper.make_tensor(tensor.name, kind, list(tensor.dims), values))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = kind
    onnx.save(model, tmp_path / "model.onnx")
    insert_bank(analyse(tmp_path / "model.onnx"), tmp_path / "out")

    onnx.checker.check_model(onnx.load(tmp_path / "out" / "model.onnx"), full_check=True)
    bank = load_bank(tmp_path / "out")
    assert {g.dtype for g in bank.gates} == {name}
    feed = bank_inputs(bank, [ADAPTER], [[1.0]])
    assert {str(array.dtype) for array in feed.values()} == {name}


# ---- a norm's weight, or a quantizer's scale? ---------------------------------------------------


def scaled(scale_name: str, *, norm: str) -> Any:
    """x' = norm(x) * scale before q."""

    def around(d: Decoder, path: str, x: str, k: int, n: int) -> str | None:
        if not path.endswith("layers.0/self_attn/q_proj"):
            return None
        scale = d.const(np.full(k, 2, np.float32), scale_name)
        if norm == "none":
            normed = d.op("Tanh", x)
        elif norm == "whole":
            normed = d.op("LayerNormalization", x, d.const(np.ones(k, np.float32)))
        else:
            square = d.op("Mul", x, x)
            mean = d.op("ReduceMean", square, d.const(np.array([-1], np.int64)))
            root = d.op("Sqrt", mean)
            if norm == "divided":
                normed = d.op("Div", x, root)
            else:
                inverse = d.op("Reciprocal", root)
                normed = d.op("Mul", x, d.op("Cast", inverse, to=1))
        return d.matmul(path, d.op("Mul", scale, normed), k, n)

    return around


def read_by_q(decoder: Decoder, directory: Path) -> str:
    """The operator whose result q's branch reads."""
    path, _ = inserted(decoder, directory)
    model = onnx.load(path)
    value = named(model, "layers.0.lora_a.q").input[0]
    return next(n.op_type for n in model.graph.node if value in n.output)


@pytest.mark.parametrize(
    ("scale", "norm", "reads"),
    [
        ("w", "divided", "Mul"),  # a norm's last step
        ("w", "inverted", "Mul"),
        ("input_layernorm.weight", "none", "Mul"),
        ("w", "none", "Tanh"),  # nothing normalised before: a quantizer's
        ("q_proj.pre_quant_scale", "divided", "Div"),
        ("q_proj.pre_quant_scale", "whole", "LayerNormalization"),
        ("q_proj.input_quantizer._pre_quant_scale", "inverted", "Mul"),
    ],
)
def test_norms_are_kept_and_quantizers_scales_are_not(
    scale: str, norm: str, reads: str, tmp_path: Path
) -> None:
    assert read_by_q(Decoder(scaled(scale, norm=norm)), tmp_path) == reads


def test_a_scale_that_could_be_either_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="'w' multiplies what LayerNormalization gives"):
        inserted(Decoder(scaled("w", norm="whole")), tmp_path)


def codes_cast_to_floats(d: Decoder, path: str, x: str, k: int, n: int) -> str | None:
    """x's rounding is nobody's operator: its scale is applied to y."""
    if not path.endswith("gate_proj"):
        return None
    codes = d.op("Cast", d.op("Mul", x, d.const(np.float32(64))), to=3)
    y = d.matmul(path, d.op("Cast", codes, to=1), k, n)
    return d.op("Mul", y, d.const(np.float32(1 / 64)))


def test_an_activation_quantized_by_hand_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="not understood: say which value the branch reads"):
        inserted(Decoder(codes_cast_to_floats), tmp_path)


def codes_of_an_unknown_maker(d: Decoder, path: str, x: str, k: int, n: int) -> str | None:
    if not path.endswith("gate_proj"):
        return None
    codes = d.op("DequantizeLinear", d.op("Cast", x, to=3), d.const(np.float32(0.1)))
    return d.matmul(path, codes, k, n)


def test_a_dequantization_without_its_quantization_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"the type of 'Cast_\d+' is number 3 of TensorProto"):
        inserted(Decoder(codes_of_an_unknown_maker), tmp_path)


# ---- fused projections --------------------------------------------------------------------------


class Fused(Decoder):
    """q | k | v in one product, cut by Split at `cuts`."""

    def __init__(self, cuts: tuple[int, int, int], *, name: str = "qkv_proj") -> None:
        self.cuts, self.name = cuts, name
        super().__init__()

    def layer(self, path: str, x: str) -> str:
        y = self.matmul(f"{path}/self_attn/{self.name}", x, HIDDEN, 3 * HIDDEN)
        sizes = self.const(np.array(self.cuts, np.int64))
        parts = [f"{path}/{p}" for p in "qkv"]
        self.nodes.append(helper.make_node("Split", [y, sizes], parts, axis=-1))
        scores = self.op("MatMul", parts[0], self.op("Transpose", parts[1], perm=self.turned))
        mixed = self.op("MatMul", self.op("Softmax", scores), parts[2])
        x = self.op("Add", x, self.linear(f"{path}/self_attn/o_proj", mixed, HIDDEN, HIDDEN))
        gate, up = (self.linear(f"{path}/mlp/{p}_proj", x, HIDDEN, WIDE) for p in ("gate", "up"))
        return self.op(
            "Add", x, self.linear(f"{path}/mlp/down_proj", self.op("Mul", gate, up), WIDE, HIDDEN)
        )


def test_a_fused_projection_is_cut_where_the_graph_cuts_it(tmp_path: Path) -> None:
    _, bank = inserted(Fused((HIDDEN, HIDDEN, HIDDEN)), tmp_path)
    qkv = next(b for b in bank.branches if b.slot == "qkv")
    assert [(p.projection, p.n) for p in qkv.parts] == [("q", 8), ("k", 8), ("v", 8)]
    assert (qkv.a, qkv.b) == ("lora_a.0.qkv", "lora_b.0.qkv")


def test_parts_that_lie_elsewhere_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"end at columns \[8, 16\].*cuts it at \[16, 20\]"):
        inserted(Fused((16, 4, 4)), tmp_path)


def test_an_adapter_of_q_and_v_alone_fits_a_fused_projection(tmp_path: Path) -> None:
    """Against x W + the products in their columns, in numpy."""
    path, bank = inserted(Fused((HIDDEN, HIDDEN, HIDDEN)), tmp_path)
    rng = np.random.default_rng(0)
    factors = {
        AdapterTarget(0, p): (rng.normal(size=(8, r)), rng.normal(size=(r, 8)))  # type: ignore[arg-type]
        for p, r in (("q", 3), ("v", 1))
    }
    feed = bank_inputs(bank, [factors], [[0.5]])
    assert feed["lora_gate.qkv"].shape == (1, 1, 4)
    delta = 0.5 * (feed["lora_a.0.qkv"] @ feed["lora_b.0.qkv"])
    np.testing.assert_allclose(
        delta[:, :8], 0.5 * np.matmul(*factors[AdapterTarget(0, "q")]), atol=1e-5
    )
    np.testing.assert_allclose(delta[:, 8:16], 0)
    np.testing.assert_allclose(
        delta[:, 16:], 0.5 * np.matmul(*factors[AdapterTarget(0, "v")]), atol=1e-5
    )
    assert answer(path, {"x": np.ones((1, 2, 8), np.float32), **feed}).shape == (1, 2, 5)
