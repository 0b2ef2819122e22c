"""TensorRT-LLM's row algebra: each module's number, name and cut; cut and join are inverse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora_build.adapters.formats.trtllm_modules import (
    BY_ID,
    MODULE_OF,
    MODULES,
    Module,
    Shape,
    local_shape,
    shape_of,
)
from remora_build.adapters.formats.trtllm_rows import (
    Row,
    factors_of,
    join,
    row_from,
    row_values,
    rows_of,
    split,
)
from remora_build.adapters.sidecar import Factor
from remora_contract.errors import AdapterInvalid
from remora_contract.targets import PROJECTIONS, AdapterTarget
from tests.buildhost.adapter_formats import (
    DOCUMENTED_IDS,
    PROJECTION_OF_ID,
    assert_same_factors,
    random_factors,
)
from tests.buildhost.documents import decoder_spec


@st.composite
def cut_rows(draw: st.DrawFn) -> tuple[Row, Shape, int]:
    """A row of any module, its whole shape and a number of ranks that divides it."""
    module = draw(st.sampled_from(MODULES))
    ranks = draw(st.sampled_from([1, 2, 3, 4]))
    parts = tuple(ranks * draw(st.integers(1, 3)) for _ in range(max(1, len(module.parts))))
    k = ranks * draw(st.integers(1, 4))
    shape = Shape(k, parts, (k,) if module.cut == "row" else parts)
    rank, dora = draw(st.integers(1, 4)), draw(st.booleans())
    seed = draw(st.integers(0, 2**32 - 1))
    values = np.random.default_rng(seed).standard_normal(row_values(rank, shape, dora))
    return row_from(values.astype(np.float32), module, 5, rank, shape, dora=dora), shape, ranks


def assert_same_row(have: Row, need: Row) -> None:
    assert (have.module, have.layer, have.rank) == (need.module, need.layer, need.rank)
    assert np.array_equal(have.flat(), need.flat())
    assert (have.magnitude is None) == (need.magnitude is None)


def test_every_documented_module_is_in_the_table_once() -> None:
    assert {m.id: m.name for m in MODULES} == DOCUMENTED_IDS
    assert {m.id: m.parts[0] for m in MODULES if len(m.parts) == 1} == PROJECTION_OF_ID
    assert set(MODULE_OF) == set(PROJECTIONS)
    assert all(m.parts or m.why for m in MODULES)


def test_output_projections_are_cut_along_their_input_and_routers_not_at_all() -> None:
    assert {m.name for m in MODULES if m.cut == "row"} == {
        "attn_dense",
        "mlp_4h_to_h",
        "cross_attn_dense",
        "moe_4h_to_h",
    }
    assert {m.name for m in MODULES if m.cut == "none"} == {"moe_router", "mlp_router"}


@given(cut_rows())
def test_joining_what_was_cut_gives_back_the_row(case: tuple[Row, Shape, int]) -> None:
    row, shape, ranks = case
    shares = split(row, shape, ranks)
    assert len(shares) == ranks
    assert_same_row(join(shares, shape), row)


@given(cut_rows())
def test_a_flat_row_has_an_inverse_whole_and_cut(case: tuple[Row, Shape, int]) -> None:
    row, shape, ranks = case
    local = local_shape(row.module, shape, ranks)
    for share in split(row, shape, ranks):
        dora = row.magnitude is not None
        assert share.values == row_values(row.rank, local, dora) == share.flat().size
        again = row_from(share.flat(), row.module, row.layer, row.rank, local, dora=dora)
        assert_same_row(again, share)


@given(cut_rows())
def test_the_ranks_together_compute_what_the_whole_row_computes(
    case: tuple[Row, Shape, int],
) -> None:
    """Column: the ranks' outputs lie side by side, part by part. Row: they are summed."""
    row, shape, ranks = case
    x = np.random.default_rng(0).standard_normal((2, shape.k)).astype(np.float32)
    whole = x @ row.in_.T @ row.out.T
    shares = split(row, shape, ranks)
    if row.module.cut == "none":
        outputs = [x @ s.in_.T @ s.out.T for s in shares]
        assert all(np.array_equal(y, outputs[0]) for y in outputs)
        assert np.allclose(outputs[0], whole, atol=1e-4)
        return
    if row.module.cut == "row":
        inputs = np.split(x, ranks, axis=1)
        summed = sum(part @ s.in_.T @ s.out.T for part, s in zip(inputs, shares, strict=True))
        assert np.allclose(summed, whole, atol=1e-4)
        return
    outputs = [x @ s.in_.T @ s.out.T for s in shares]
    first = 0
    for part in shape.parts:
        local_first = first // ranks
        pieces = [y[:, local_first : local_first + part // ranks] for y in outputs]
        assert np.allclose(np.concatenate(pieces, 1), whole[:, first : first + part], atol=1e-4)
        first += part


def test_a_column_cut_divides_out_and_magnitude_a_row_cut_divides_in() -> None:
    shape = Shape(4, (6,), (6,))
    values = np.arange(row_values(2, shape, True), dtype=np.float32)
    column = row_from(values, BY_ID[1], 0, 2, shape, dora=True)
    second = split(column, shape, 2)[1]
    assert np.array_equal(second.in_, column.in_)
    assert np.array_equal(second.out, column.out[3:])
    assert second.magnitude is not None and column.magnitude is not None
    assert np.array_equal(second.magnitude, column.magnitude[3:])

    down = row_from(values, BY_ID[6], 0, 2, Shape(4, (6,), (4,)), dora=True)
    second = split(down, Shape(4, (6,), (4,)), 2)[1]
    assert np.array_equal(second.in_, down.in_[:, 2:])
    assert np.array_equal(second.out, down.out)
    assert second.magnitude is not None and down.magnitude is not None
    assert np.array_equal(second.magnitude, down.magnitude)


def test_a_fused_module_is_cut_inside_each_part() -> None:
    shape = Shape(2, (4, 2, 2), (4, 2, 2))
    out = np.arange(8, dtype=np.float32)[:, None]
    row = Row(BY_ID[0], 0, np.ones((1, 2), np.float32), out)
    assert [s.out[:, 0].tolist() for s in split(row, shape, 2)] == [[0, 1, 4, 6], [2, 3, 5, 7]]


@pytest.mark.parametrize(
    ("projection", "changes", "ranks"),
    [("k", {"kv_heads": 2}, 4), ("q", {"heads": 6}, 4), ("o", {"heads": 6}, 4), ("up", {}, 5)],
)
def test_heads_are_never_divided_between_ranks(
    projection: Any, changes: dict[str, int], ranks: int
) -> None:
    """k of 2 heads has 16 rows, which 4 ranks could share, but not a head each."""
    decoder = decoder_spec(**changes)
    module = MODULE_OF[projection]
    with pytest.raises(AdapterInvalid, match=rf"{module.name} .*{ranks} ranks cannot"):
        local_shape(module, shape_of(module, decoder, None), ranks)


def test_files_of_different_adapters_are_not_joined() -> None:
    shape = Shape(4, (4,), (4,))
    rows = [
        row_from(np.full(16, i, np.float32), BY_ID[1], 3, 2, Shape(4, (4,), (4,)), dora=False)
        for i in range(2)
    ]
    with pytest.raises(AdapterInvalid, match=r"attn_q of layer 3: in must be the same.*rank 1"):
        join(rows, Shape(4, (8,), (8,)))
    down = [Row(BY_ID[6], 3, r.in_, r.out) for r in rows]
    with pytest.raises(AdapterInvalid, match="mlp_4h_to_h of layer 3: out must be the same"):
        join(down, Shape(8, shape.parts, (8,)))
    with_m = [Row(BY_ID[6], 3, rows[0].in_, rows[0].out, m) for m in (None, np.ones(4))]
    with pytest.raises(AdapterInvalid, match="the magnitude must be the same"):
        join(with_m, Shape(8, shape.parts, (8,)))


def test_factors_become_rows_and_rows_factors() -> None:
    decoder = decoder_spec()
    factors = random_factors(decoder, rank=3)
    rows = rows_of(factors)
    assert [(r.layer, r.module.id) for r in rows] == sorted((r.layer, r.module.id) for r in rows)

    again: dict[AdapterTarget, Factor] = {}
    for row in rows:
        again |= factors_of(row, shape_of(row.module, decoder, None), 2.0, None)
    assert_same_factors(again, factors)


def test_the_parts_of_a_fused_module_share_their_input_factor() -> None:
    decoder = decoder_spec()
    module = BY_ID[0]
    shape = shape_of(module, decoder, None)
    row = row_from(
        np.arange(row_values(2, shape, False), dtype=np.float32), module, 1, 2, shape, dora=False
    )
    factors = factors_of(row, shape, 1.0, None)
    assert [t.name() for t in factors] == ["layers.1.q", "layers.1.k", "layers.1.v"]
    x = np.random.default_rng(0).standard_normal((3, decoder.hidden)).astype(np.float32)
    fused = x @ row.in_.T @ row.out.T
    apart = np.concatenate([x @ f.a @ f.b for f in factors.values()], 1)
    assert np.allclose(apart, fused, rtol=1e-5)


@pytest.mark.parametrize(("order", "first"), [("up-gate", "up"), ("gate-up", "gate")])
def test_the_halves_of_a_fused_gate_and_up_lie_as_told(order: Any, first: str) -> None:
    decoder = decoder_spec()
    module: Module = BY_ID[18]
    shape = shape_of(module, decoder, order)
    half = decoder.intermediate
    out = np.repeat([[1.0], [2.0]], half, axis=0).astype(np.float32)
    row = Row(module, 0, np.ones((1, decoder.hidden), np.float32), out)
    values = {t.projection: float(f.b[0, 0]) for t, f in factors_of(row, shape, 1.0, order).items()}
    assert values == {first: 1.0, "gate" if first == "up" else "up": 2.0}
