"""The short ways to bytes and to "all finite" agree with the libraries they stand in for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from remora_build.adapters.finite import all_finite
from remora_build.adapters.tensor_file import write_tensors


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_every_number_of_half_precision_is_judged_as_numpy_does(dtype: Any) -> None:
    values = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    finite = np.isfinite(values.astype(np.float32))
    assert [all_finite(v) for v in values.reshape(-1, 1)] == finite.tolist()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_one_bad_number_among_many_is_found(dtype: Any) -> None:
    values = np.linspace(-60_000, 60_000, 999).astype(dtype)
    assert all_finite(values)
    assert all_finite(values[:0])
    for bad in (np.nan, np.inf, -np.inf):
        spoilt = values.copy()
        spoilt[500] = bad
        assert not all_finite(spoilt)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.dictionaries(
        st.text(min_size=1, max_size=20).filter(lambda name: name != "__metadata__"),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
        min_size=1,
        max_size=6,
    ),
    dtype=st.sampled_from([np.float16, np.float32]),
)
def test_a_tensor_file_is_the_bytes_the_library_writes(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], dtype: Any
) -> None:
    tensors = {
        name: np.arange(np.prod(shape), dtype=dtype).reshape(shape)
        for name, shape in shapes.items()
    }
    write_tensors(tmp_path / "ours.safetensors", tensors)
    assert (tmp_path / "ours.safetensors").read_bytes() == save(tensors)


def test_a_transposed_tensor_is_written_in_its_own_order(tmp_path: Path) -> None:
    turned = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write_tensors(tmp_path / "a.safetensors", {"a": turned})
    assert (tmp_path / "a.safetensors").read_bytes() == save({"a": np.ascontiguousarray(turned)})
