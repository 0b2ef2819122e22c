"""Reading beside the step thread, and remembering broken files."""

import os
import queue
import threading

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


def read(directory):
    return load_weights(directory, BUNDLE)


def test_weights_arrive_under_their_digest(adapters):
    results = queue.Queue()
    loader = Loader(read, lambda *result: results.put(result))
    assert loader.start(adapters[0])
    digest, weights = results.get(timeout=20)
    assert digest == weights.digest == adapters[0].digest
    loader.close()


def test_only_so_many_are_in_flight_and_none_twice(adapters):
    held, results = threading.Event(), queue.Queue()

    def slow(directory):
        held.wait(20)
        return read(directory)

    loader = Loader(slow, lambda *result: results.put(result))
    assert loader.start(adapters[0])
    assert not loader.start(adapters[0])
    assert loader.start(adapters[1])
    assert not loader.start(adapters[2]) and MAX_IN_FLIGHT == 2
    held.set()
    loader.finished(results.get(timeout=20)[0])
    assert loader.start(adapters[2])
    loader.close()


def test_an_unexpected_error_becomes_our_fault_with_its_cause(adapters):
    def broken(directory):
        raise ZeroDivisionError("oops")

    results = queue.Queue()
    loader = Loader(broken, lambda *result: results.put(result))
    loader.start(adapters[0])
    _, error = results.get(timeout=20)
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
    reader = VerifyingReader(counted)
    for _ in range(3):
        with pytest.raises(ArtifactInvalid, match="damaged"):
            reader(adapter.digest, adapter.directory)
    assert len(reads) == 1
    path.write_bytes(good)
    os.utime(path, ns=(1, 1))
    assert reader(adapter.digest, adapter.directory).digest == adapter.digest


def test_other_bytes_in_the_registered_directory_are_refused(adapters):
    with pytest.raises(ArtifactInvalid, match="new revision"):
        VerifyingReader(read)(adapters[0].digest, adapters[1].directory)


def test_a_directory_that_is_gone_is_named(adapters, tmp_path):
    with pytest.raises(ArtifactInvalid, match="gone"):
        VerifyingReader(read)(adapters[0].digest, tmp_path / "gone")
