"""Published bytes through the whole controller: real servers, real mTLS, real stubs."""

from __future__ import annotations

import grpc
import pytest

from remora_contract import errors
from remora_contract.digests import canonical_json, digest_bytes
from remora_contract.rpc import from_rpc_error
from remora_protos.control.v1 import control_pb2 as cp
from remora_protos.control.v1 import control_pb2_grpc as cp_grpc
from tests.controller import artifacts
from tests.controller.harness import WAIT_S


@pytest.fixture
def published(world):
    chunks = [bytes(range(256)) * 4096, b"tail"]  # 1 MiB and a little
    return artifacts.publish(world.home.repository, "bundle", "big", "1", chunks), chunks


def fetch(device, digest: str, offset: int = 0, length: int = 0) -> list[bytes]:
    request = cp.FetchRequest(chunk_digest=digest, offset=offset, length=length)
    stub = cp_grpc.ArtifactsStub(device.channel)
    return [message.data for message in stub.Fetch(request, timeout=WAIT_S)]


def test_a_chunk_arrives_whole_in_small_messages(world, published):
    _, chunks = published
    parts = fetch(world.device(), digest_bytes(chunks[0]))
    assert b"".join(parts) == chunks[0]
    assert max(map(len, parts)) <= 256 << 10


@pytest.mark.parametrize(("offset", "length"), [(1000, 0), (0, 10), (777_777, 4), (1 << 20, 0)])
def test_any_range_of_a_chunk_can_be_asked_for(world, published, offset, length):
    _, chunks = published
    expected = chunks[0][offset : offset + length if length else None]
    assert b"".join(fetch(world.device(), digest_bytes(chunks[0]), offset, length)) == expected


def test_a_manifest_comes_as_it_was_published(world, published):
    manifest, _ = published
    stub = cp_grpc.ArtifactsStub(world.device().channel)
    answer = stub.GetManifest(cp.GetManifestRequest(digest=manifest.digest), timeout=WAIT_S)
    assert answer.manifest_json == canonical_json(manifest)


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (cp.FetchRequest(chunk_digest="../../ca.key"), errors.InvalidInput),
        (cp.FetchRequest(chunk_digest=digest_bytes(b"unpublished")), errors.NotFound),
        (cp.FetchRequest(chunk_digest=digest_bytes(b"tail"), offset=5), errors.InvalidInput),
        (cp.FetchRequest(chunk_digest=digest_bytes(b"tail"), length=9), errors.InvalidInput),
    ],
)
def test_only_published_bytes_can_be_asked_for(world, published, request_, error):
    stub = cp_grpc.ArtifactsStub(world.device().channel)
    with pytest.raises(grpc.RpcError) as e:
        list(stub.Fetch(request_, timeout=WAIT_S))
    assert isinstance(from_rpc_error(e.value), error)
