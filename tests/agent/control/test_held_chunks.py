"""What a device holds already is not shipped to it again, and nothing that it holds is believed."""

from __future__ import annotations

import random

import pytest

from remora_agent.control.activation import Desired, Record
from remora_agent.control.garbage import collect
from remora_agent.control.held_chunks import find_chunks
from remora_contract.device_phase import Phase
from remora_contract.digests import canonical_json, digest_bytes
from tests.agent.control.test_staging import check_whole, make_stager, stage
from tests.agent.control.test_staging import layout as layout
from tests.agent.control.test_staging import repository as repository
from tests.agent.control.test_staging import source as source
from tests.support.repository import make_bundle, make_release

PIECE = 100_000  # of the repository's chunks


@pytest.fixture
def revisions(repository):
    """Two bundles; the second differs in its graph and in one piece of five."""
    weights = bytearray(random.Random(5).randbytes(5 * PIECE))
    first = _bundle(repository, b"graph", weights)
    weights[2 * PIECE : 3 * PIECE] = random.Random(6).randbytes(PIECE)
    return first, _bundle(repository, b"other graph", weights)


def _bundle(repository, graph, weights):
    files = {"model.onnx": graph, "model.onnx.data": bytes(weights)}
    return repository.publish("bundle", files, make_bundle)


def _missing(old, new):
    return sum(size for digest, size in new.chunks().items() if digest not in old.chunks())


def test_a_new_revision_ships_only_the_chunks_that_differ(layout, source, revisions):
    first, second = revisions
    stage(make_stager(layout, source), first)
    before = source.sent
    [fetched] = stage(make_stager(layout, source), second)
    assert fetched.received_bytes == source.sent - before == _missing(first, second)
    assert PIECE < _missing(first, second) < 2 * PIECE
    check_whole(layout, second)
    check_whole(layout, first)


def test_a_damaged_file_here_costs_its_bytes_and_no_more(layout, source, revisions):
    first, second = revisions
    stage(make_stager(layout, source), first)
    path = layout.artifact(first.digest) / "model.onnx.data"
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    before = source.sent
    stage(make_stager(layout, source), second)
    assert source.sent - before == _missing(first, second) + PIECE
    check_whole(layout, second)


@pytest.mark.parametrize("content", [b"", b"{", b'{"format_version": 1}', None])
def test_a_manifest_that_says_nothing_costs_the_whole_artifact(layout, source, revisions, content):
    first, second = revisions
    stage(make_stager(layout, source), first)
    (remembered,) = layout.artifacts.glob(".*.manifest")
    remembered.unlink() if content is None else remembered.write_bytes(content)
    before = source.sent
    stage(make_stager(layout, source), second)
    assert source.sent - before == second.bytes
    check_whole(layout, second)


def test_an_artifact_that_is_gone_offers_nothing_and_its_manifest_leaves_the_disk(
    layout, source, revisions
):
    first, second = revisions
    stage(make_stager(layout, source), first, second)
    wanted = {digest_bytes(b"graph"), digest_bytes(b"other graph")}
    assert set(find_chunks(layout, wanted)) == wanted
    release = make_release("kept", second)
    layout.release(release.release_id).write_text(_text(release))
    desired = Desired(1, release.release_id, _text(release), "r", 0.0, False)
    collect(layout, Record(desired, Phase.COMMITTED, 0.0, release.release_id), ())
    assert set(find_chunks(layout, wanted)) == {digest_bytes(b"other graph")}
    assert len(list(layout.artifacts.iterdir())) == 2, "the artifact and its manifest"


def _text(release):
    return canonical_json(release).decode()
