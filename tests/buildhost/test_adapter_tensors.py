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
from remora_build.adapters.sidecar import Factor, cast_factors
from remora_build.adapters.tensor_file import Tensor, write_tensors
from remora_contract.digests import digest_file
from remora_contract.errors import AdapterInvalid
from remora_contract.targets import AdapterTarget


def made(tensors: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {
        name: Tensor(values.dtype.name, values.shape, lambda values=values: values)  # type: ignore
        for name, values in tensors.items()
    }


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
    digest = write_tensors(tmp_path / "ours.safetensors", made(tensors))
    assert (tmp_path / "ours.safetensors").read_bytes() == save(tensors)
    assert digest == digest_file(tmp_path / "ours.safetensors")


def test_a_transposed_tensor_is_written_in_its_own_order(tmp_path: Path) -> None:
    turned = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write_tensors(tmp_path / "a.safetensors", made({"a": turned}))
    assert (tmp_path / "a.safetensors").read_bytes() == save({"a": np.ascontiguousarray(turned)})


def test_values_of_another_shape_than_announced_never_become_a_file(tmp_path: Path) -> None:
    """The header is written before they are made."""
    lying = Tensor("float32", (2, 3), lambda: np.zeros((3, 2), np.float32))
    with pytest.raises(ValueError, match="said to be"):
        write_tensors(tmp_path / "a.safetensors", {"a": lying})


@pytest.mark.parametrize("sign", [1, -1])
def test_float16_ends_where_rounding_to_it_gives_infinity(sign: int) -> None:
    last = np.nextafter(np.float32(65520), np.float32(0))
    for value, fits in ((last, True), (np.float32(65520), False)):
        factor = Factor(np.full((1, 1), sign * value), np.ones((1, 1), np.float32), 1.0)
        tensor = cast_factors({AdapterTarget(0, "q"): factor}, "float16")["layers.0.q.a"]
        if fits:
            assert tensor.values().item() == sign * 65504
        else:
            with pytest.raises(AdapterInvalid, match="--dtype float32"):
                tensor.values()
