"""Which adapters the runtime is opened with: what leaves for another one, what stays."""

import pytest

from remora_agent.bank.directory import Registered
from remora_agent.bank.policy import BankLimits
from remora_agent.edgellm.loaded import LoadedAdapters
from remora_contract.errors import Exhausted


def record(name, directory):
    return Registered(name, "r1", f"sha256:{name * 64}", directory, 4, 100, 100)


@pytest.fixture
def loaded(tmp_path):
    loaded = LoadedAdapters(BankLimits(rank=8, bytes=None))
    for name in "ab":
        bring_in(loaded, record(name, tmp_path))
    return loaded


def bring_in(loaded, one):
    files = loaded.with_one_more(loaded.files, one, one.directory / one.name)
    loaded.became(files)


def test_the_least_recently_used_leaves_but_not_what_is_pinned(loaded, tmp_path):
    a, b, c = (record(name, tmp_path) for name in "abc")
    loaded.pin(a)
    bring_in(loaded, c)
    assert set(loaded.files) == {a.digest, c.digest}
    loaded.unpin(a.digest)
    bring_in(loaded, b)
    assert set(loaded.files) == {c.digest, b.digest}


def test_what_left_before_it_was_pinned_is_not_pinned(loaded, tmp_path):
    a, c = record("a", tmp_path), record("c", tmp_path)
    bring_in(loaded, c)  # between another thread's load and pin of a
    with pytest.raises(Exhausted, match="adapter a left for others"):
        loaded.pin(a)
    assert not loaded.pinned
