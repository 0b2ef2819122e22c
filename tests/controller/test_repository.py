"""Reading published artifacts."""

import pytest

from remora_contract.artifact import chunk_key, manifest_key
from remora_contract.digests import digest_bytes
from remora_contract.errors import ArtifactInvalid, DocumentInvalid, NotFound
from remora_controller.repository import Repository
from tests.controller import artifacts


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def repository(tmp_path, clock):
    return Repository(tmp_path, clock)


def test_an_empty_folder_holds_nothing(repository):
    assert repository.index().published == ()


def test_what_is_published_is_listed_with_its_chunks(repository, tmp_path):
    bundle = artifacts.bundle(tmp_path)
    (listed,) = repository.index().published
    assert (listed.kind, listed.name, listed.digest) == ("bundle", "tiny", bundle.digest)
    path, size = repository.chunk(next(iter(bundle.chunks())))
    assert path.stat().st_size == size == 1000


def test_something_published_later_is_found_within_a_second(repository, tmp_path, clock):
    assert repository.index().published == ()
    artifacts.bundle(tmp_path)
    assert repository.index().published == ()
    clock.now += 1.0
    assert len(repository.index().published) == 1


def test_an_operator_sees_at_once_what_was_just_published(repository, tmp_path):
    assert repository.index().published == ()
    artifacts.bundle(tmp_path)
    assert len(repository.index(is_fresh=True).published) == 1


def test_a_revision_of_a_name_is_found_under_each_of_its_names(repository, tmp_path):
    manifest = artifacts.adapter(tmp_path)
    record = (tmp_path / "names/adapter/sql/1.json").read_bytes()
    artifacts.write(tmp_path / "names/adapter/sql/stable.json", record)
    found = {(p.name, p.revision) for p in repository.index().published}
    assert found == {("sql", "1"), ("sql", "stable")}
    assert all(p.digest == manifest.digest for p in repository.index().published)


def test_a_chunk_no_manifest_names_is_not_served(repository, tmp_path):
    artifacts.bundle(tmp_path)
    secret = digest_bytes(b"secret")
    artifacts.write(tmp_path / chunk_key(secret), b"secret")
    with pytest.raises(NotFound, match="no published artifact"):
        repository.chunk(secret)


@pytest.mark.parametrize("digest", ["../../ca.key", "sha256:../../../etc/passwd", "", "sha256:ZZ"])
def test_a_digest_that_is_a_path_is_refused(repository, digest):
    with pytest.raises(DocumentInvalid):
        repository.chunk(digest)
    with pytest.raises(DocumentInvalid):
        repository.manifest_json(digest)


def test_a_truncated_chunk_is_reported_not_served(repository, tmp_path):
    bundle = artifacts.bundle(tmp_path)
    digest = next(iter(bundle.chunks()))
    (tmp_path / chunk_key(digest)).write_bytes(b"short")
    with pytest.raises(ArtifactInvalid, match="publish its artifact again"):
        repository.chunk(digest)


def test_a_damaged_manifest_hides_only_its_own_artifact(repository, tmp_path, caplog):
    bundle, sql = artifacts.bundle(tmp_path), artifacts.adapter(tmp_path)
    (tmp_path / manifest_key(bundle.digest)).write_text("{")
    assert [p.digest for p in repository.index().published] == [sql.digest]
    assert "artifact.unreadable" in caplog.text
    with pytest.raises(NotFound, match="remora-build publish"):
        repository.manifest_json(bundle.digest)


def test_a_manifest_under_another_digest_is_left_out(repository, tmp_path):
    bundle = artifacts.bundle(tmp_path)
    other = digest_bytes(b"other")
    (tmp_path / manifest_key(bundle.digest)).rename(tmp_path / manifest_key(other))
    assert repository.index().manifests == {}
