"""Reading beside the step thread, and remembering broken files."""

import gc
import itertools
import os
import queue
import re
import threading
import traceback
import weakref

import pytest

from remora_agent.bank.directory import AdapterDirectory
from remora_agent.bank.loader import MAX_IN_FLIGHT, Loader, VerifyingReader
from remora_agent.bank.weights import load_weights
from remora_contract.adapter import WEIGHTS_FILE
from remora_contract.errors import ArtifactInvalid, InternalFault
from tests.support.runtime import add_adapter, make_bundle

BUNDLE = make_bundle()


@pytest.fixture
def adapters(tmp_path):
    directory = AdapterDirectory(BUNDLE)
    return [
        add_adapter(directory, BUNDLE, tmp_path / f"{i}", f"a{i}", "r1", seed=i) for i in range(3)
    ]


def never():
    return 0.0


def read(directory):
    return load_weights(directory, BUNDLE)


def test_weights_arrive_under_their_digest_with_the_time_it_took(adapters):
    results, clock = queue.Queue(), itertools.count().__next__
    loader = Loader(read, lambda *result: results.put(result), clock)
    assert loader.start(adapters[0])
    digest, weights, seconds = results.get(timeout=20)
    assert digest == weights.digest == adapters[0].digest
    assert seconds == 2  # the reader looks at the clock once in between
    loader.close()


def test_only_so_many_are_in_flight_and_none_twice(adapters):
    held, results = threading.Event(), queue.Queue()

    def slow(directory):
        held.wait(20)
        return read(directory)

    loader = Loader(slow, lambda *result: results.put(result), never)
    assert loader.start(adapters[0])
    assert not loader.start(adapters[0])
    assert loader.start(adapters[1])
    assert not loader.start(adapters[2]) and MAX_IN_FLIGHT == 2
    held.set()
    loader.finished(results.get(timeout=20)[0])
    assert loader.start(adapters[2])
    loader.close()


def test_what_is_asked_of_a_closed_loader_is_not_read(adapters):
    loader = Loader(read, lambda *result: None, never)
    loader.close()
    assert not loader.start(adapters[0])


def test_an_unexpected_error_becomes_our_fault_with_its_cause(adapters):
    def broken(directory):
        raise ZeroDivisionError("oops")

    results = queue.Queue()
    loader = Loader(broken, lambda *result: results.put(result), never)
    loader.start(adapters[0])
    _, error, _ = results.get(timeout=20)
    assert isinstance(error, InternalFault) and isinstance(error.__cause__, ZeroDivisionError)
    loader.close()


def test_a_broken_file_is_not_read_again_until_it_changes(adapters):
    adapter, reads = adapters[0], []

    def counted(directory):
        reads.append(directory)
        return read(directory)

    path = adapter.directory / WEIGHTS_FILE
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    reader = VerifyingReader(counted, never)
    for _ in range(3):
        with pytest.raises(ArtifactInvalid, match="damaged"):
            reader(adapter.digest, adapter.directory)
    assert len(reads) == 1
    path.write_bytes(good)
    os.utime(path, ns=(1, 1))
    assert reader(adapter.digest, adapter.directory).digest == adapter.digest


def test_a_file_that_was_replaced_by_another_of_the_same_size_and_time_is_read(adapters):
    adapter = adapters[0]
    path = adapter.directory / WEIGHTS_FILE
    good, times = path.read_bytes(), path.stat()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    reader = VerifyingReader(read, never)
    with pytest.raises(ArtifactInvalid, match=re.escape(str(path))):
        reader(adapter.digest, adapter.directory)
    fresh = path.with_suffix(".new")
    fresh.write_bytes(good)
    os.utime(fresh, ns=(times.st_atime_ns, times.st_mtime_ns))
    fresh.replace(path)
    assert reader(adapter.digest, adapter.directory).digest == adapter.digest


def test_a_broken_file_is_tried_again_after_a_while(adapters):
    now, faults = [0.0], [ArtifactInvalid("the disk was busy")]

    def once_broken(directory):
        if faults:
            raise faults.pop()
        return read(directory)

    reader = VerifyingReader(once_broken, lambda: now[0], retry_s=60.0)
    for now[0] in (0.0, 59.9):
        with pytest.raises(ArtifactInvalid, match="busy"):
            reader(adapters[0].digest, adapters[0].directory)
    now[0] = 60.0
    assert reader(adapters[0].digest, adapters[0].directory).digest == adapters[0].digest


def test_other_bytes_in_the_registered_directory_are_refused(adapters):
    with pytest.raises(ArtifactInvalid, match="new revision"):
        VerifyingReader(read, never)(adapters[0].digest, adapters[1].directory)


def test_a_broken_file_keeps_nothing_of_what_was_read_or_of_who_asked(adapters):
    """A caller may ask for it all day."""
    seen = []

    def watched(directory):
        weights = read(directory)
        seen.append(weakref.ref(weights))
        return weights

    reader, lengths = VerifyingReader(watched, never), []
    for _ in range(5):
        with pytest.raises(ArtifactInvalid) as caught:
            reader(adapters[0].digest, adapters[1].directory)
        lengths.append(len(list(traceback.walk_tb(caught.value.__traceback__))))
        del caught
    gc.collect()
    assert len(seen) == 1 and seen[0]() is None
    assert len(set(lengths)) == 1


def test_a_directory_that_is_gone_is_named(adapters, tmp_path):
    with pytest.raises(ArtifactInvalid, match="gone"):
        VerifyingReader(read, never)(adapters[0].digest, tmp_path / "gone")
