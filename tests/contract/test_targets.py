"""Names of adapter targets have exact inverses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora_contract.errors import DocumentInvalid
from remora_contract.targets import (
    ALL_GROUPS,
    ALL_PROJECTIONS,
    GROUP_OF,
    GROUPS,
    MODEL_GROUPS,
    PARTS,
    PROJECTIONS,
    AdapterTarget,
    is_matrix,
    matrix_name,
)


@given(
    st.integers(0, 999_999), st.sampled_from([p for p in ALL_PROJECTIONS if p not in MODEL_GROUPS])
)
def test_every_target_is_found_again_by_its_name(layer, projection):
    target = AdapterTarget(layer, projection)
    assert AdapterTarget.from_name(target.name()) == target


@pytest.mark.parametrize(
    "name",
    [
        "layers.01.q",
        "layers.-1.q",
        "layers.1.x",
        "layers.1.q.a",
        "layers.0.head",
        "q",
        "layers.1.q\n",
    ],
)
def test_what_is_no_target_is_refused(name):
    with pytest.raises(DocumentInvalid):
        AdapterTarget.from_name(name)


def test_groups_cover_each_projection_once():
    assert [p for g in GROUPS for p in PARTS[g]] == list(PROJECTIONS)
    assert [p for g in ALL_GROUPS for p in PARTS[g]] == list(ALL_PROJECTIONS)
    assert set(GROUP_OF) == set(ALL_PROJECTIONS)


@pytest.mark.parametrize("name", MODEL_GROUPS)
def test_what_stands_outside_the_layers_has_a_name_without_one(name):
    target = AdapterTarget.from_name(name)
    assert (target.name(), target.projection) == (name, name)
    with pytest.raises(ValueError, match="no layer"):
        AdapterTarget(1, name)


@given(st.integers(0, 999_999), st.sampled_from(ALL_GROUPS))
def test_every_matrix_but_the_embeddings_table_is_known_by_its_name(layer, group):
    assert is_matrix(matrix_name(layer, group)) == (group != "embed")


@pytest.mark.parametrize(
    "name", ["layers.01.qkv", "layers.1.q", "layers.1.head", "layers.1.qkv\n", "qkv", ""]
)
def test_what_names_no_matrix_is_told_apart(name):
    assert not is_matrix(name)
