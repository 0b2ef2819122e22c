"""TensorRT-LLM's files: written as it documents them, read back exactly, nothing else let in."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from remora_build.adapters.formats.carried import Carried
from remora_build.adapters.formats.registry import StoredDtype
from remora_build.adapters.formats.trtllm import write_config, write_trtllm, write_weights
from remora_build.adapters.formats.trtllm_modules import BY_ID
from remora_build.adapters.formats.trtllm_read import read_trtllm
from remora_build.adapters.formats.trtllm_rows import Row
from remora_build.adapters.sidecar import Factor
from remora_contract.bundle import Bundle
from remora_contract.decoder import ExpertsSpec, LayerKind
from remora_contract.errors import AdapterInvalid, Unsupported
from remora_contract.targets import PROJECTIONS, AdapterTarget
from tests.buildhost.adapter_formats import (
    PROJECTION_OF_ID,
    assert_same_factors,
    carried,
    decode_lora_weights,
    random_factors,
    save_pair,
)
from tests.buildhost.documents import decoder_spec, write_bundle

DECODER = decoder_spec()
DTYPES: dict[StoredDtype, Any] = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("V2"),
    "float32": np.dtype("<f4"),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("base"), DECODER)


def q_row(rank: int = 2, fill: float = 1.0) -> np.ndarray:
    """A row for q: k = n = 32."""
    return np.full(rank * 64, fill, np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_files_hold_what_the_documentation_says(tmp_path: Path, dtype: StoredDtype) -> None:
    adapter = carried(DECODER, rank=3)
    write_trtllm(tmp_path, adapter, DECODER, dtype, 1)

    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model.lora_config.npy",
        "model.lora_weights.npy",
    ]
    weights = np.load(tmp_path / "model.lora_weights.npy", allow_pickle=False)
    config = np.load(tmp_path / "model.lora_config.npy", allow_pickle=False)
    longest = 3 * (DECODER.hidden + DECODER.intermediate)
    assert weights.shape == (1, 14, longest)
    assert weights.dtype == DTYPES[dtype]
    assert config.shape == (1, 14, 3)
    assert config.dtype == np.int32
    if dtype == "bfloat16":
        weights = weights.view(ml_dtypes.bfloat16)
    decoded = decode_lora_weights(weights.astype(np.float32), config, DECODER)
    for (module, layer), (in_, out) in decoded.items():
        factor = adapter.factors[AdapterTarget(layer, PROJECTION_OF_ID[module])]
        assert np.array_equal(in_, factor.a.T)
        assert np.array_equal(out, factor.b.T)
    assert len(decoded) == len(adapter.factors)


def test_a_dora_row_ends_with_its_magnitude_and_adds_a_fourth_column(tmp_path: Path) -> None:
    plain = Row(BY_ID[1], 0, np.ones((2, 3), np.float32), np.ones((4, 2), np.float32))
    dora = Row(BY_ID[4], 0, plain.in_, plain.out, np.arange(4, dtype=np.float32))
    write_weights(tmp_path / "w.npy", [plain, dora], "float32")
    write_config(tmp_path / "c.npy", [plain, dora])

    assert np.load(tmp_path / "c.npy").tolist() == [[[1, 0, 2, 0], [4, 0, 2, 1]]]
    weights = np.load(tmp_path / "w.npy")
    assert weights.shape == (1, 2, 18)
    assert weights[0, 1, 14:].tolist() == [0, 1, 2, 3]
    assert weights[0, 0, 14:].tolist() == [0, 0, 0, 0]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    ranks=st.sampled_from([1, 2]),
    rank=st.integers(1, 40),
    chosen=st.sets(st.sampled_from(PROJECTIONS), min_size=1),
    seed=st.integers(0, 1000),
)
def test_reading_gives_back_what_was_written_for_any_number_of_ranks(
    bundle: Bundle,
    tmp_path_factory: pytest.TempPathFactory,
    dtype: StoredDtype,
    ranks: int,
    rank: int,
    chosen: Any,
    seed: int,
) -> None:
    """Ranks of 32 and 40 reach and exceed the base's dimensions."""
    directory = tmp_path_factory.mktemp("files")
    adapter = carried(DECODER, rank=rank, projections=tuple(sorted(chosen)), seed=seed)
    write_trtllm(directory, adapter, DECODER, dtype, ranks)
    assert_same_factors(read_trtllm(directory, bundle, None).factors, adapter.factors)


def test_each_rank_gets_its_own_pair(tmp_path: Path) -> None:
    write_trtllm(tmp_path, carried(DECODER), DECODER, "float16", 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"model.lora_{what}.{rank}.npy" for what in ("config", "weights") for rank in (0, 1)
    ]
    halves = [np.load(tmp_path / f"model.lora_weights.{rank}.npy") for rank in (0, 1)]
    down = (DECODER.intermediate // 2 + DECODER.hidden) * 2  # in cut, out whole
    up = (DECODER.hidden + DECODER.intermediate // 2) * 2  # in whole, out cut
    assert halves[0].shape == halves[1].shape == (1, 14, max(down, up))


def test_ranks_that_cannot_share_a_head_each_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match=r"attn_k consists of 2 heads.* 4 ranks cannot share"):
        write_trtllm(tmp_path, carried(DECODER), DECODER, "float16", 4)


def test_what_the_type_cannot_hold_is_refused_with_its_row(tmp_path: Path) -> None:
    factors = random_factors(DECODER, projections=("q",))
    factors[AdapterTarget(1, "q")].b[0, 0] = 70_000
    with pytest.raises(AdapterInvalid, match=r"attn_q of layer 1 reaches 7e\+04.*bfloat16"):
        write_trtllm(tmp_path, Carried(factors), DECODER, "float16", 1)
    write_trtllm(tmp_path, Carried(factors), DECODER, "bfloat16", 1)


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_trtllm(tmp_path / name, carried(DECODER), DECODER, "float16", 2)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_files_of_other_programs_are_read_in_their_shapes_and_types(
    bundle: Bundle, tmp_path: Path
) -> None:
    """Four columns without DoRA, no leading dimension, rows wider than any needs, bfloat16 as
    ml_dtypes saves it."""
    adapter = random_factors(DECODER, projections=("q",))
    flat = [
        np.concatenate([f.a.T.ravel(), f.b.T.ravel(), np.zeros(9, np.float32)])
        for f in adapter.values()
    ]
    weights = np.array(flat).astype(ml_dtypes.bfloat16)
    np.save(tmp_path / "model.lora_weights.npy", weights)
    np.save(tmp_path / "model.lora_config.npy", np.array([[1, 0, 2, 0], [1, 1, 2, 0]], np.int32))

    read = read_trtllm(tmp_path, bundle, None)

    assert_same_factors(read.factors, adapter)
    assert {f.scaling for f in read.factors.values()} == {1.0}
    assert read.source_config == {}


def test_fused_attention_is_read_as_its_three_projections(bundle: Bundle, tmp_path: Path) -> None:
    in_ = np.arange(2 * 32, dtype=np.float32) / 64
    out = np.arange((32 + 16 + 16) * 2, dtype=np.float32) / 64
    save_pair(tmp_path, np.concatenate([in_, out])[None], [[0, 1, 2]])

    factors = read_trtllm(tmp_path, bundle, None).factors

    assert [t.name() for t in sorted(factors)] == ["layers.1.k", "layers.1.q", "layers.1.v"]
    rows = out.reshape(64, 2)
    for target, expected in (("q", rows[:32]), ("k", rows[32:48]), ("v", rows[48:])):
        factor = factors[AdapterTarget(1, target)]  # type: ignore[arg-type]
        assert np.array_equal(factor.a, in_.reshape(2, 32).T)
        assert np.array_equal(factor.b, expected.T)


def test_a_fused_gate_and_up_needs_its_order_told(bundle: Bundle, tmp_path: Path) -> None:
    out = np.concatenate([np.full(48, 1.0), np.full(48, 2.0)])
    save_pair(tmp_path, np.concatenate([np.ones(32), out])[None].astype(np.float32), [[18, 0, 1]])

    with pytest.raises(AdapterInvalid, match=r"row 0: mlp_gate_up .*--gate-up-order"):
        read_trtllm(tmp_path, bundle, None)
    for order, up in (("up-gate", 1.0), ("gate-up", 2.0)):
        factors = read_trtllm(tmp_path, bundle, order).factors  # type: ignore[arg-type]
        assert factors[AdapterTarget(0, "up")].b[0, 0] == up
        assert factors[AdapterTarget(0, "gate")].b[0, 0] == 3.0 - up


@pytest.mark.parametrize(
    ("id_", "name"),
    [
        (8, "cross_attn_qkv"),
        (9, "cross_attn_q"),
        (10, "cross_attn_k"),
        (11, "cross_attn_v"),
        (12, "cross_attn_dense"),
        (13, "moe_h_to_4h"),
        (14, "moe_4h_to_h"),
        (15, "moe_gate"),
        (16, "moe_router"),
        (17, "mlp_router"),
    ],
)
def test_modules_a_decoder_does_not_have_are_refused_by_name(
    bundle: Bundle, tmp_path: Path, id_: int, name: str
) -> None:
    save_pair(tmp_path, np.stack([q_row(), q_row()]), [[1, 0, 2], [id_, 0, 2]])
    with pytest.raises(Unsupported, match=rf"lora_config\.npy: row 1: {name} \(id {id_}\) is"):
        read_trtllm(tmp_path, bundle, None)


def test_a_dense_module_in_a_layer_of_experts_is_an_error(tmp_path: Path) -> None:
    """mlp_4h_to_h would be one expert's, and nobody could say whose."""
    experts = ExpertsSpec(4, 2, DECODER.intermediate, True)
    decoder = replace(DECODER, experts=experts, kinds=(LayerKind(experts=True), LayerKind()))
    mixed = write_bundle(tmp_path / "base", decoder)
    save_pair(tmp_path, np.ones((1, 160), np.float32), [[6, 0, 2]])
    with pytest.raises(AdapterInvalid, match="row 0: the base's layer 0 has no mlp_4h_to_h"):
        read_trtllm(tmp_path, mixed, None)
    save_pair(tmp_path, np.ones((1, 160), np.float32), [[6, 1, 2]])
    assert list(read_trtllm(tmp_path, mixed, None).factors) == [AdapterTarget(1, "down")]


@pytest.mark.parametrize("ranks", [1, 2])
def test_dora_rows_are_read_back_with_their_magnitudes(
    bundle: Bundle, tmp_path: Path, ranks: int
) -> None:
    factors = random_factors(DECODER)
    for target in list(factors)[::2]:
        scale = np.arange(factors[target].b.shape[1], dtype=np.float32) / 8
        factors[target] = replace(factors[target], scale=scale)
    write_trtllm(tmp_path, Carried(factors), DECODER, "float16", ranks)

    read = read_trtllm(tmp_path, bundle, None).factors

    assert_same_factors(read, factors)
    for target, factor in factors.items():
        have = read[target].scale
        assert (have is None) == (factor.scale is None)
        assert have is None or np.array_equal(have, factor.scale)


def test_the_magnitude_of_a_fused_row_belongs_to_its_parts(bundle: Bundle, tmp_path: Path) -> None:
    magnitude = np.concatenate([np.full(32, 1.0), np.full(16, 2.0), np.full(16, 3.0)])
    row = np.concatenate([np.ones(2 * (32 + 64)), magnitude]).astype(np.float32)
    save_pair(tmp_path, row[None], [[0, 0, 2, 1]])
    factors = read_trtllm(tmp_path, bundle, None).factors
    for projection, value, n in (("q", 1.0, 32), ("k", 2.0, 16), ("v", 3.0, 16)):
        scale = factors[AdapterTarget(0, projection)].scale  # type: ignore[arg-type]
        assert scale is not None and scale.tolist() == [value] * n


def test_a_dora_row_without_its_magnitude_is_an_error(bundle: Bundle, tmp_path: Path) -> None:
    save_pair(tmp_path, q_row()[None], [[1, 0, 2, 1]])
    with pytest.raises(AdapterInvalid, match="row 0: attn_q of rank 2 needs 160 values"):
        read_trtllm(tmp_path, bundle, None)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ([19, 0, 2], "module id 19 is none of TensorRT-LLM's 0 to 18"),
        ([-1, 0, 2], "module id -1 is none"),
        ([1, 2, 2], "layer 2; the base has 2 layers"),
        ([1, -1, 2], "layer -1; the base has 2 layers"),
        ([1, 0, 0], "rank 0 is outside"),
        ([1, 0, -3], "rank -3 is outside"),
        ([1, 0, 2**31 - 1], "rank 2147483647 is outside"),
        ([1, 0, 3], "attn_q of rank 3 needs 192 values for this base, a row .* has 128"),
        ([6, 0, 2], "mlp_4h_to_h of rank 2 needs 160 values"),
        ([1, 0, 1], "holds more than the 64 values that rank 1 takes"),
        ([2, 0, 2], "attn_k of layer 0.* holds more than the 96 values"),
    ],
)
def test_a_line_that_does_not_fit_the_base_is_named(
    bundle: Bundle, tmp_path: Path, line: list[int], what: str
) -> None:
    save_pair(tmp_path, q_row()[None], [line])
    with pytest.raises(AdapterInvalid, match=rf"\.npy: row 0.*{what}"):
        read_trtllm(tmp_path, bundle, None)


def test_a_flag_that_is_no_flag_is_named(bundle: Bundle, tmp_path: Path) -> None:
    save_pair(tmp_path, q_row()[None], [[1, 0, 2, 7]])
    with pytest.raises(AdapterInvalid, match="row 0: its DoRA flag is 7"):
        read_trtllm(tmp_path, bundle, None)


def test_a_module_listed_twice_is_an_error(bundle: Bundle, tmp_path: Path) -> None:
    save_pair(tmp_path, np.stack([q_row(), q_row()]), [[1, 0, 2], [1, 0, 2]])
    with pytest.raises(AdapterInvalid, match="row 1: attn_q of layer 0 is listed twice"):
        read_trtllm(tmp_path, bundle, None)


def test_fused_and_single_rows_for_one_projection_are_an_error(
    bundle: Bundle, tmp_path: Path
) -> None:
    fused = np.ones(2 * (32 + 64), np.float32)
    single = np.concatenate([q_row(), np.zeros(64, np.float32)])
    save_pair(tmp_path, np.stack([fused, single]), [[0, 1, 2], [1, 1, 2]])
    with pytest.raises(AdapterInvalid, match=r"row 1: attn_q of layer 1 adapts layers\.1\.q a sec"):
        read_trtllm(tmp_path, bundle, None)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_a_number_that_is_not_finite_is_refused_with_its_row(
    bundle: Bundle, tmp_path: Path, value: float, dtype: Any
) -> None:
    rows = np.stack([q_row(), q_row()]).astype(dtype)
    rows[1, 70] = value
    save_pair(tmp_path, rows, [[1, 0, 2], [1, 1, 2]])
    where = re.escape(f"{tmp_path / 'model.lora_weights.npy'}: row 1 (attn_q of layer 1)")
    with pytest.raises(AdapterInvalid, match=rf"{where} holds NaN or infinity"):
        read_trtllm(tmp_path, bundle, None)


@pytest.mark.parametrize(
    ("weights", "config", "what"),
    [
        (np.zeros((1, 1, 128), np.float32), np.zeros((1, 1, 5), np.int32), "3 or 4 columns"),
        (np.zeros((1, 1, 128), np.float32), np.zeros((1, 1, 3), np.float32), "3 or 4 columns"),
        (np.zeros((1, 2, 128), np.float32), np.zeros((1, 1, 3), np.int32), "2 rows, its config 1"),
        (np.zeros((2, 1, 128), np.float32), np.zeros((1, 1, 3), np.int32), r"shape \[2, 1, 128\]"),
        (np.zeros(128, np.float32), np.zeros((1, 1, 3), np.int32), r"shape \[128\]"),
        (np.zeros((1, 1, 128), np.int32), np.zeros((1, 1, 3), np.int32), "holds int32"),
        (np.zeros((1, 0, 128), np.float32), np.zeros((1, 0, 3), np.int32), "lists 0 modules"),
        (np.zeros((1, 39, 1), np.float32), np.zeros((1, 39, 3), np.int32), "lists 39 modules"),
    ],
)
def test_arrays_of_another_shape_are_refused(
    bundle: Bundle, tmp_path: Path, weights: np.ndarray, config: np.ndarray, what: str
) -> None:
    np.save(tmp_path / "model.lora_weights.npy", weights)
    np.save(tmp_path / "model.lora_config.npy", config)
    with pytest.raises(AdapterInvalid, match=what):
        read_trtllm(tmp_path, bundle, None)


def test_an_incomplete_set_of_ranks_is_recognised(bundle: Bundle, tmp_path: Path) -> None:
    write_trtllm(tmp_path, carried(DECODER), DECODER, "float16", 2)
    (tmp_path / "model.lora_weights.0.npy").rename(tmp_path / "model.lora_weights.2.npy")
    with pytest.raises(AdapterInvalid, match=r"model\.lora_weights\.0\.npy does not exist"):
        read_trtllm(tmp_path, bundle, None)


def test_a_whole_adapter_beside_files_of_ranks_is_ambiguous(bundle: Bundle, tmp_path: Path) -> None:
    write_trtllm(tmp_path, carried(DECODER), DECODER, "float16", 2)
    write_trtllm(tmp_path, carried(DECODER), DECODER, "float16", 1)
    with pytest.raises(AdapterInvalid, match="which one is meant"):
        read_trtllm(tmp_path, bundle, None)


def test_ranks_of_two_adapters_are_not_put_together(bundle: Bundle, tmp_path: Path) -> None:
    write_trtllm(tmp_path, carried(DECODER), DECODER, "float16", 2)
    other = tmp_path / "other"
    other.mkdir()
    write_trtllm(other, carried(DECODER, seed=9), DECODER, "float16", 2)
    (other / "model.lora_weights.1.npy").replace(tmp_path / "model.lora_weights.1.npy")
    with pytest.raises(AdapterInvalid, match="must be the same on every rank"):
        read_trtllm(tmp_path, bundle, None)
    write_trtllm(other, carried(DECODER, rank=3), DECODER, "float16", 2)
    (other / "model.lora_config.1.npy").replace(tmp_path / "model.lora_config.1.npy")
    with pytest.raises(AdapterInvalid, match=r"lora_config\.1\.npy differs"):
        read_trtllm(tmp_path, bundle, None)


def test_the_row_a_factor_comes_from_decides_its_layer(bundle: Bundle, tmp_path: Path) -> None:
    """The last layer of two, alone: nothing is renumbered."""
    factor = Factor(np.ones((32, 2), np.float32), np.ones((2, 32), np.float32), 1.0)
    adapter = Carried({AdapterTarget(1, "o"): factor})
    write_trtllm(tmp_path, adapter, DECODER, "float32", 2)
    assert list(read_trtllm(tmp_path, bundle, None).factors) == [AdapterTarget(1, "o")]
