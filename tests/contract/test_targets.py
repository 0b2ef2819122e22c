"""Names of adapter targets have exact inverses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora_contract.errors import DocumentInvalid
from remora_contract.targets import GROUP_OF, GROUPS, PARTS, PROJECTIONS, AdapterTarget


@given(st.integers(0, 999_999), st.sampled_from(PROJECTIONS))
def test_every_target_is_found_again_by_its_name(layer, projection):
    target = AdapterTarget(layer, projection)
    assert AdapterTarget.from_name(target.name()) == target


@pytest.mark.parametrize(
    "name", ["layers.01.q", "layers.-1.q", "layers.1.x", "layers.1.q.a", "q", "layers.1.q\n"]
)
def test_what_is_no_target_is_refused(name):
    with pytest.raises(DocumentInvalid):
        AdapterTarget.from_name(name)


def test_groups_cover_each_projection_once():
    assert [p for g in GROUPS for p in PARTS[g]] == list(PROJECTIONS)
    assert set(GROUP_OF) == set(PROJECTIONS)
