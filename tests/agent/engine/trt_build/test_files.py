"""Facts of a built engine: what was written is read again, and nothing else is taken."""

from __future__ import annotations

import pytest

from remora_agent.engine.trt.files import EngineFacts, Profile, read, written
from remora_contract.errors import ArtifactInvalid

FACTS = EngineFacts((Profile("prefill", 1, 256), Profile("decode", 8, 1)), 4096, 64)


def test_facts_are_read_as_they_were_written():
    texts = written(FACTS)
    assert all(isinstance(v, str) for v in texts.values())
    assert read(texts, "here") == FACTS
    assert (FACTS.index("prefill"), FACTS.index("decode")) == (0, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"profiles": "[]x"},
        {"profiles": '[{"kind":"other","rows":1,"tokens":1}]'},
        {"profiles": '[{"kind":"decode","rows":0,"tokens":1}]'},
        {"context": "many"},
        {"max_bank_rank": ""},
    ],
)
def test_other_facts_are_refused(change):
    with pytest.raises(ArtifactInvalid, match="here: facts of no TensorRT engine"):
        read(written(FACTS) | change, "here")


def test_missing_facts_are_refused():
    with pytest.raises(ArtifactInvalid, match="build it again"):
        read({}, "here")


def test_a_missing_profile_is_named():
    with pytest.raises(ArtifactInvalid, match="no decode profile"):
        EngineFacts(FACTS.profiles[:1], 1, 0).index("decode")
