"""The engine cache: what it gives back is complete and undamaged, or nothing."""

from __future__ import annotations

import errno
import multiprocessing
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora_agent.engine import cache as cache_module
from remora_agent.engine import disk
from remora_agent.engine.cache import CacheEntry, EngineCache, Stored, read_entry, to_evict
from remora_agent.engine.recipe import BuildKey, Machine, Recipe, cpu_features
from remora_contract.bundle import BundleFile
from remora_contract.digests import digest_bytes
from remora_contract.errors import Cancelled, Exhausted, InternalFault, Refused


def key(name: str, version: str = "1") -> BuildKey:
    recipe = Recipe("onnxruntime", version, 1, 4, Machine("x86_64", digest_bytes(b"flags")))
    return BuildKey((BundleFile("model.onnx", 1, digest_bytes(name.encode())),), recipe)


def never() -> bool:
    return False


def put(cache: EngineCache, k: BuildKey, size: int = 100) -> CacheEntry:
    with cache.building(k.digest, never) as staging:
        out = staging / "engine"
        out.mkdir()
        (out / "model.onnx").write_bytes(b"m" * 10)
        (out / "model.data").write_bytes(b"d" * (size - 10))
        return cache.commit(out, k, {"base": ""})


class Clock:
    def __init__(self) -> None:
        self.now = 10**18

    def __call__(self) -> int:
        self.now += 10**9
        return self.now


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines", 1 << 30, Clock())


def test_a_committed_build_is_found_with_its_facts_and_bytes(cache: EngineCache):
    made = put(cache, key("a"))
    found = cache.find(key("a").digest)
    assert found == made and found.bytes == 100
    assert found.manifest.facts == {"base": ""}
    assert read_entry(found.directory).manifest.digest == found.manifest.digest


@pytest.mark.parametrize("other", [key("b"), key("a", version="2")])
def test_another_graph_or_another_runtime_is_another_build(cache: EngineCache, other: BuildKey):
    put(cache, key("a"))
    assert cache.find(other.digest) is None


def test_instruction_sets_are_those_that_every_core_has():
    one = "processor: 0\nflags : a b c\n\nprocessor: 1\nflags : c b\n"
    assert cpu_features(one) == cpu_features("flags: b c")
    assert cpu_features("Features : fp asimd") != cpu_features("Features : fp")


@pytest.mark.parametrize("name", ["model.data", "model.onnx", "engine.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_a_damaged_entry_is_removed_and_not_given_back(cache: EngineCache, name: str, damage: str):
    path = put(cache, key("a")).directory / name
    if damage == "truncate":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "flip":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    assert cache.find(key("a").digest) is None
    assert not path.parent.exists()
    put(cache, key("a"))
    assert cache.find(key("a").digest) is not None


def test_damage_without_a_changed_time_is_seen_after_the_next_boot(
    cache: EngineCache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    path = put(cache, key("a")).directory / "model.data"
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    with path.open("r+b") as f:
        f.write(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    boot = tmp_path / "boot_id"
    boot.write_text("another boot")
    monkeypatch.setattr(cache_module, "_BOOT_ID", boot)
    assert cache.find(key("a").digest) is None


def test_a_verified_entry_is_not_hashed_again(cache: EngineCache, monkeypatch: pytest.MonkeyPatch):
    put(cache, key("a"))

    def refuse(*_: object) -> None:
        raise AssertionError("hashed")

    monkeypatch.setattr(cache_module, "verify_files", refuse)
    assert cache.find(key("a").digest) is not None


def test_the_least_recently_used_goes_first_and_one_in_use_never(tmp_path: Path):
    cache = EngineCache(tmp_path, 2100, Clock())
    entries = {name: put(cache, key(name), 1000) for name in "abc"}
    cache.find(key("a").digest)
    overhead = sum(s.bytes for s in cache.stored()) - 3000
    cache.max_bytes = 2000 + overhead
    assert cache.evict([key("b").digest]) == [key("c").digest]
    assert not entries["c"].directory.exists()
    cache.max_bytes = 0
    assert cache.evict([key("b").digest]) == [key("a").digest]
    assert cache.find(key("b").digest) is not None


STORED = st.builds(
    Stored, st.text("abcdef", min_size=1, max_size=3), st.integers(0, 100), st.integers(0, 9)
)


@given(
    st.lists(STORED, unique_by=lambda s: s.key),
    st.integers(0, 400),
    st.sets(st.text("abcdef", min_size=1, max_size=3)),
)
def test_eviction_takes_as_few_of_the_oldest_as_needed(stored, cap, in_use):
    gone = to_evict(stored, cap, in_use)
    left = [s for s in stored if s.key not in gone]
    assert not set(gone) & in_use
    fits = sum(s.bytes for s in left) <= cap
    assert fits or all(s.key in in_use for s in left)
    if gone:
        last = next(s for s in stored if s.key == gone[-1])
        assert sum(s.bytes for s in left) + last.bytes > cap
        assert all(s.used_ns >= last.used_ns for s in left if s.key not in in_use)


def test_an_interrupted_build_leaves_nothing_after_the_next_start(tmp_path: Path):
    cache = EngineCache(tmp_path, 1 << 30)
    with cache.building(key("a").digest, never) as staging:
        (staging / "half").write_bytes(b"x")
        EngineCache(tmp_path, 1 << 30)
        assert staging.exists(), "a running build's folder is not a leftover"
        kept = staging.rename(staging.with_name(staging.name + "x"))
    EngineCache(tmp_path, 1 << 30)
    assert not kept.exists()
    assert cache.find(key("a").digest) is None


def test_a_failed_build_removes_its_folder(cache: EngineCache):
    with pytest.raises(ZeroDivisionError), cache.building(key("a").digest, never) as staging:
        raise ZeroDivisionError
    assert not staging.exists()


def _build_slowly(root: str, started: object, finish: object) -> None:
    cache = EngineCache(Path(root), 1 << 30)
    with cache.building(key("a").digest, never) as staging:
        started.set()
        finish.wait(20)
        out = staging / "engine"
        out.mkdir()
        (out / "model.onnx").write_bytes(b"theirs")
        cache.commit(out, key("a"), {})


def test_a_second_builder_waits_for_the_first_and_finds_its_work(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    started, finish = context.Event(), context.Event()
    other = context.Process(target=_build_slowly, args=(str(tmp_path), started, finish))
    other.start()
    assert started.wait(20)
    cache = EngineCache(tmp_path, 1 << 30)
    found: list[CacheEntry | None] = []
    waiting = threading.Event()

    def second() -> None:
        def tell() -> bool:
            waiting.set()
            return False

        with cache.building(key("a").digest, tell):
            found.append(cache.find(key("a").digest))

    thread = threading.Thread(target=second)
    thread.start()
    assert waiting.wait(20) and not found
    finish.set()
    thread.join(20)
    other.join(20)
    assert found[0] is not None and found[0].bytes == 6


def test_waiting_for_another_builder_can_be_cancelled(cache: EngineCache):
    with (
        cache.building(key("a").digest, never),
        pytest.raises(Cancelled),
        cache.building(key("a").digest, lambda: True),
    ):
        raise AssertionError("two builders at once")


def test_a_full_disk_is_named_and_leaves_the_cache_usable(
    cache: EngineCache, monkeypatch: pytest.MonkeyPatch
):
    def full(path: Path, recurse: bool = True) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "sync_tree", full)
        with pytest.raises(Exhausted, match="no space left"):
            put(cache, key("a"))
    assert cache.find(key("a").digest) is None
    put(cache, key("a"))


@pytest.mark.parametrize("place", ["/proc/engines", "{tmp}/file", "{tmp}/file/engines"])
def test_a_place_that_cannot_hold_engines_is_refused_with_what_to_do(tmp_path: Path, place: str):
    (tmp_path / "file").touch()
    root = Path(place.format(tmp=tmp_path))
    with pytest.raises(Refused, match=f"{root}: .*choose another directory"):
        EngineCache(root, 1 << 20)


def test_a_folder_that_cannot_be_written_is_refused_before_a_build(tmp_path: Path, monkeypatch):
    EngineCache(tmp_path, 1 << 20)

    def read_only(*_: object, **__: object):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(cache_module.tempfile, "TemporaryFile", read_only)
    with pytest.raises(Refused, match="Read-only"):
        EngineCache(tmp_path, 1 << 20)


def test_other_disk_errors_name_the_path():
    with pytest.raises(InternalFault, match="/somewhere"), disk.disk_errors(Path("/somewhere")):
        raise OSError(errno.EIO, "Input/output error")
