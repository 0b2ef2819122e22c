"""What a release asks of a device, judged the same by controller and device."""

from __future__ import annotations

import pytest

from remora_contract.compat import constraint_refusals
from remora_contract.release import Constraints


def codes(wants: Constraints, **have: object) -> list[str]:
    facts = {"memory_bytes": 8 << 30, "agent_version": "0.12.1", "backends": {"onnxruntime": "1"}}
    return [r.code for r in constraint_refusals(wants, **{**facts, **have})]


@pytest.mark.parametrize(
    ("have", "need", "refused"),
    [
        ("0.12.1", "0.12.1", False),
        ("0.12.1", "0.9", False),
        ("0.9.9", "0.10", True),
        ("0.12.1rc1", "0.12.2", True),
        ("0.13.0.dev3", "0.13.1", True),
        ("", "0.1", True),
    ],
)
def test_versions_are_compared_by_their_leading_numbers(have, need, refused):
    assert bool(codes(Constraints(min_agent_version=need), agent_version=have)) is refused


def test_all_refusals_come_at_once():
    wants = Constraints(16 << 30, "99.0", ("tensorrt",))
    assert codes(wants) == ["memory", "agent_version", "backend"]
    assert codes(Constraints()) == []
