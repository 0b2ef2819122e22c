"""Publishing: idempotent, immutable names, resumable after a kill anywhere, shared chunks."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remora_build.inspect.repository import describe_repository
from remora_build.publish.publisher import Published, publish
from remora_build.publish.repository import all_names, missing_chunks, read_manifest
from remora_build.publish.store import LocalStore
from remora_contract.adapter import Adapter
from remora_contract.artifact import Manifest, chunk_key, manifest_key, name_key
from remora_contract.bundle import QuantSpec, load_bundle
from remora_contract.digests import digest_bytes, short
from remora_contract.errors import (
    ArtifactInvalid,
    Conflict,
    DocumentInvalid,
    Exhausted,
    Refused,
)
from remora_contract.memory_need import memory_facts
from tests.buildhost.documents import BASE_DIGEST, decoder_spec, write_bundle
from tests.support.adapters import random_tensors, write_sidecar

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
WEIGHTS = np.random.default_rng(0).bytes(3 << 20)


class PowerCut(BaseException):
    """The process ends here: nothing handles it."""


def put(directory: Path, repository: Path, **options: Any) -> Published:
    options = {"name": "m", "revision": "1", "now": NOW} | options
    return publish(directory, LocalStore(repository), **options)


def bundle_dir(path: Path, weights: bytes = WEIGHTS, **options: Any) -> Path:
    write_bundle(path, decoder_spec(), files={"model.onnx.data": weights}, **options)
    return path


def adapter_dir(path: Path, seed: int = 1) -> Adapter:
    tensors = random_tensors(decoder_spec(), seed=seed, r=3, projections=("q", "down"))
    return write_sidecar(path, BASE_DIGEST, tensors, dtype="float16")


def manifest_of(repository: Path, digest: str) -> Manifest:
    manifest = read_manifest(LocalStore(repository), digest)
    assert manifest is not None
    return manifest


def restore(repository: Path, manifest: Manifest, out: Path) -> Path:
    """What a device does: chunks by key, joined into files."""
    for file in manifest.files:
        path = out / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        data = b"".join((repository / chunk_key(c.digest)).read_bytes() for c in file.chunks)
        assert digest_bytes(data) == file.digest
        path.write_bytes(data)
    return out


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_every_published_file_can_be_put_together_again(tmp_path: Path) -> None:
    source = bundle_dir(tmp_path / "source")
    report = put(source, tmp_path / "repo")

    manifest = manifest_of(tmp_path / "repo", report.digest)
    out = restore(tmp_path / "repo", manifest, tmp_path / "out")

    assert snapshot(out) == snapshot(source)
    assert report.total_bytes == report.new_bytes == manifest.bytes
    assert report.total_chunks == report.new_chunks > 3
    assert manifest.published_at == "2030-01-02T03:04:05Z"
    assert manifest.signatures == ()
    assert not (tmp_path / "repo" / "tmp").exists()


def test_a_bundles_manifest_carries_what_planning_needs(tmp_path: Path) -> None:
    quant = QuantSpec("int4", 32)
    source = bundle_dir(tmp_path / "b", dtype="float16", max_bank_rank=24, quant=quant)
    manifest = manifest_of(tmp_path / "repo", put(source, tmp_path / "repo").digest)
    assert manifest.kind == "bundle"
    assert manifest.base_digest == BASE_DIGEST
    assert manifest.facts == {
        "model": "a model",
        "family": "qwen3",
        "dialect": "native",
        "opset": 24,
        "dtype": "float16",
        "quant": "int4",
        "quant_block": 32,
        "context": 128,
        "max_bank_rank": 24,
        "layers": 2,
        "hidden": 32,
        "kv_heads": 2,
        "head_dim": 8,
        "vocab": 64,
        "kv_bytes_per_token": 2 * 2 * 2 * 8 * 2,
        "activations": "none",
        "experts": False,
        **memory_facts(load_bundle(source)),
    }


def test_an_adapters_manifest_carries_what_planning_needs(tmp_path: Path) -> None:
    adapter = adapter_dir(tmp_path / "a")
    report = put(tmp_path / "a", tmp_path / "repo")
    manifest = manifest_of(tmp_path / "repo", report.digest)
    assert (manifest.kind, manifest.digest) == ("adapter", adapter.digest)
    assert manifest.base_digest == BASE_DIGEST
    assert manifest.facts == {
        "rank": 3,
        "ranks": {"q": 3, "down": 3},
        "projections": ["q", "down"],
        "dtype": "float16",
    }


def test_name_and_revision_default_to_directory_and_digest(tmp_path: Path) -> None:
    adapter = adapter_dir(tmp_path / "polite")
    report = put(tmp_path / "polite", tmp_path / "repo", name=None, revision=None)
    assert (report.name, report.revision) == ("polite", short(adapter.digest))
    assert len(report.revision) == 12


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "", "a b", "x" * 129])
def test_a_name_that_is_no_plain_name_is_refused(tmp_path: Path, name: str) -> None:
    adapter_dir(tmp_path / "a")
    with pytest.raises(DocumentInvalid, match="name"):
        put(tmp_path / "a", tmp_path / "repo", name=name)
    with pytest.raises(DocumentInvalid, match="revision"):
        put(tmp_path / "a", tmp_path / "repo", revision=name)
    assert not (tmp_path / "repo").exists()


def test_publishing_again_adds_nothing(tmp_path: Path) -> None:
    source = bundle_dir(tmp_path / "b")
    first = put(source, tmp_path / "repo")
    before = snapshot(tmp_path / "repo")

    second = put(source, tmp_path / "repo", now=datetime.now(timezone.utc))

    assert (second.new_bytes, second.new_chunks) == (0, 0)
    assert second.digest == first.digest
    assert snapshot(tmp_path / "repo") == before


def test_a_published_revision_never_changes(tmp_path: Path) -> None:
    first = adapter_dir(tmp_path / "a", seed=1)
    second = adapter_dir(tmp_path / "b", seed=2)
    put(tmp_path / "a", tmp_path / "repo")
    before = snapshot(tmp_path / "repo")

    with pytest.raises(Conflict, match=short(first.digest)) as error:
        put(tmp_path / "b", tmp_path / "repo")

    assert short(second.digest) in str(error.value)
    assert "--revision" in str(error.value)
    assert snapshot(tmp_path / "repo") == before
    assert put(tmp_path / "b", tmp_path / "repo", revision="2").digest == second.digest


def test_bundles_and_adapters_have_names_of_their_own(tmp_path: Path) -> None:
    adapter_dir(tmp_path / "a")
    bundle_dir(tmp_path / "b")
    put(tmp_path / "a", tmp_path / "repo")
    put(tmp_path / "b", tmp_path / "repo")
    assert [n.kind for n in all_names(LocalStore(tmp_path / "repo"))] == ["bundle", "adapter"]


def test_two_names_of_one_artifact_share_manifest_and_chunks(tmp_path: Path) -> None:
    source = bundle_dir(tmp_path / "b")
    put(source, tmp_path / "repo", name="first")
    again = put(source, tmp_path / "repo", name="second")
    assert again.new_bytes == 0
    assert len(list((tmp_path / "repo" / "manifests").iterdir())) == 1
    names = [(n.name, n.digest) for n in all_names(LocalStore(tmp_path / "repo"))]
    assert names == [("first", again.digest), ("second", again.digest)]


def test_a_new_revision_adds_only_what_changed(tmp_path: Path) -> None:
    put(bundle_dir(tmp_path / "b1", WEIGHTS * 4), tmp_path / "repo", revision="1")
    middle = len(WEIGHTS) * 2
    changed = (WEIGHTS * 4)[:middle] + b"a few bytes" + (WEIGHTS * 4)[middle:]

    report = put(bundle_dir(tmp_path / "b2", changed), tmp_path / "repo", revision="2")

    assert 0 < report.new_bytes < report.total_bytes / 2
    restored = restore(
        tmp_path / "repo", manifest_of(tmp_path / "repo", report.digest), tmp_path / "out"
    )
    assert snapshot(restored) == snapshot(tmp_path / "b2")


@pytest.mark.parametrize("damage", [b"", WEIGHTS[:-1], WEIGHTS[:-1] + b"\0", None])
def test_a_damaged_source_is_refused_before_anything_is_written(
    tmp_path: Path, damage: bytes | None
) -> None:
    path = bundle_dir(tmp_path / "b") / "model.onnx.data"
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    with pytest.raises(ArtifactInvalid, match=r"model\.onnx\.data"):
        put(tmp_path / "b", tmp_path / "repo")
    assert not (tmp_path / "repo").exists()


def test_a_file_that_changes_while_it_is_read_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundle_dir(tmp_path / "b") / "model.onnx.data"
    monkeypatch.setattr(
        "remora_build.publish.publisher.verify_files",
        lambda *_: path.write_bytes(bytes(len(WEIGHTS))),
    )
    with pytest.raises(ArtifactInvalid, match=r"model\.onnx\.data changed while"):
        put(tmp_path / "b", tmp_path / "repo")
    assert list(all_names(LocalStore(tmp_path / "repo"))) == []
    assert not (tmp_path / "repo" / "manifests").exists()


def test_a_directory_that_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactInvalid, match=r"neither bundle\.json nor adapter\.json"):
        put(tmp_path, tmp_path / "repo")


def test_a_folder_with_other_things_in_it_is_no_repository(tmp_path: Path) -> None:
    source = bundle_dir(tmp_path / "b")
    with pytest.raises(Refused, match=r"not empty and no repository \(it holds bundle\.json\)"):
        put(source, source)
    with pytest.raises(Refused, match="is a file"):
        put(source, source / "bundle.json")


def cutting_store(repository: Path, at: int) -> LocalStore:
    """A store whose process dies at its `at`-th fsync or rename, before or after it happens."""
    count = 0

    def step(do: Callable[[], None]) -> None:
        nonlocal count
        count += 1
        if count == at:
            raise PowerCut
        do()
        count += 1
        if count == at:
            raise PowerCut

    return LocalStore(
        repository,
        fsync=lambda handle: step(lambda: os.fsync(handle)),
        replace=lambda a, b: step(lambda: Path(a).replace(b)),
    )


def names_are_whole(repository: Path) -> bool:
    """Every visible name leads to a manifest whose chunks are there and right."""
    describe_repository(repository, verify=True)
    return True


def test_a_publish_killed_anywhere_leaves_whole_names_and_resumes(tmp_path: Path) -> None:
    old = bundle_dir(tmp_path / "old", WEIGHTS[: 1 << 20])
    new = bundle_dir(tmp_path / "new", WEIGHTS)
    cuts = 0
    for at in range(1, 200):
        repository = tmp_path / f"repo{at}"
        put(old, repository, revision="1")
        try:
            publish(new, cutting_store(repository, at), name="m", revision="2", now=NOW)
        except PowerCut:
            cuts += 1
        else:
            break
        assert names_are_whole(repository)
        there = len(list((repository / "cas").rglob("*/*/*")))

        report = put(new, repository, revision="2")

        assert names_are_whole(repository)
        assert len(list(all_names(LocalStore(repository)))) == 2
        assert report.new_chunks == len(list((repository / "cas").rglob("*/*/*"))) - there
        assert not (repository / "tmp").exists()
    assert cuts >= 4 * 5  # (fsync, rename) x (before, after) x (3 chunks, manifest, name) at least


def test_each_step_is_durable_before_the_next_refers_to_it(tmp_path: Path) -> None:
    """Bytes are synced before their rename, chunk folders before the manifest, its folder before
    the name: a power cut cannot keep the reference and lose what it refers to."""
    repository, synced = tmp_path / "repo", set()
    seen: list[str] = []

    def fsync(handle: int) -> None:
        os.fsync(handle)
        synced.add(Path(f"/proc/self/fd/{handle}").readlink())

    def replace(temporary: Path, path: Path) -> None:
        assert temporary in synced
        temporary.replace(path)
        synced.discard(path.parent)
        above = {"cas": [], "manifests": ["cas"], "names": ["cas", "manifests"]}
        top = path.relative_to(repository).parts[0]
        for earlier in above[top]:
            folders = [p for p in (repository / earlier).rglob("*") if p.is_dir()]
            assert {repository, repository / earlier, *folders} <= synced
        seen.append(top)

    store = LocalStore(repository, fsync=fsync, replace=replace)
    publish(bundle_dir(tmp_path / "b"), store, name="m", revision="1", now=NOW)

    assert sorted(set(seen), key=seen.index) == ["cas", "manifests", "names"]
    assert seen.count("manifests") == seen.count("names") == 1
    assert repository / "names" / "bundle" / "m" in synced


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_the_path_and_shows_nothing(tmp_path: Path, number: int) -> None:
    source = bundle_dir(tmp_path / "b")
    calls = iter(range(100))

    def fsync(handle: int) -> None:
        if next(calls) == 3:
            raise OSError(number, os.strerror(number))

    with pytest.raises(Exhausted, match="repo/cas/sha256"):
        publish(source, LocalStore(tmp_path / "repo", fsync=fsync), name="m", revision="1", now=NOW)
    assert list(all_names(LocalStore(tmp_path / "repo"))) == []
    assert list((tmp_path / "repo" / "tmp").iterdir()) == []
    assert put(source, tmp_path / "repo").new_chunks > 0


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    source = bundle_dir(tmp_path / "b")

    def replace(_: Path, to: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(Refused, match="Permission denied"):
        publish(
            source, LocalStore(tmp_path / "repo", replace=replace), name="m", revision="1", now=NOW
        )


def test_a_chunk_that_was_lost_or_cut_short_is_written_again(tmp_path: Path) -> None:
    source = bundle_dir(tmp_path / "b")
    report = put(source, tmp_path / "repo")
    store = LocalStore(tmp_path / "repo")
    manifest = manifest_of(tmp_path / "repo", report.digest)
    lost, short_one = list(manifest.chunks())[-2:]
    (tmp_path / "repo" / chunk_key(lost)).unlink()
    (tmp_path / "repo" / chunk_key(short_one)).write_bytes(b"x")
    assert set(missing_chunks(store, manifest)) == {lost, short_one}

    assert put(source, tmp_path / "repo").new_chunks == 2
    assert names_are_whole(tmp_path / "repo")


def test_publishers_at_the_same_time_do_not_disturb_each_other(tmp_path: Path) -> None:
    sources = [bundle_dir(tmp_path / f"b{i}", WEIGHTS + bytes([i]) * 5000) for i in range(4)]
    threads = [
        threading.Thread(target=put, args=(s, tmp_path / "repo"), kwargs={"revision": str(i)})
        for i, s in enumerate(sources)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(all_names(LocalStore(tmp_path / "repo")))) == 4
    assert names_are_whole(tmp_path / "repo")


def test_keys_are_those_of_the_contract(tmp_path: Path) -> None:
    report = put(bundle_dir(tmp_path / "b"), tmp_path / "repo")
    manifest = manifest_of(tmp_path / "repo", report.digest)
    keys = {chunk_key(d) for d in manifest.chunks()}
    keys |= {manifest_key(report.digest), name_key("bundle", "m", "1")}
    assert set(snapshot(tmp_path / "repo")) - {".publish.lock"} == keys
    record = json.loads((tmp_path / "repo" / name_key("bundle", "m", "1")).read_text())
    assert record == {"digest": report.digest}
