"""From a bundle to a built engine in the cache: found there, or built in a child process.

Decides nothing about the graph; `engine.build_child` does the work with the backend's builder.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from remora_agent.engine.cache import CacheEntry, EngineCache
from remora_agent.engine.child import ChildLimits, run_child
from remora_agent.engine.recipe import Recipe, build_key, graph_files
from remora_agent.host import Progress
from remora_contract.bundle import Bundle
from remora_contract.digests import canonical_json, short
from remora_contract.engine import build_disk_bytes, flat
from remora_contract.errors import Exhausted

log = logging.getLogger(__name__)

_CHILD = "remora_agent.engine.build_child"
_RESULT_DIR = "engine"
FACT_INSTEAD = "instead_of"  # why no engine was built of a better graph; absent where one was


def never() -> bool:
    """A build nobody cancels."""
    return False


def ignore(phase: str, done: float) -> None:
    """Progress nobody watches."""


@dataclass(frozen=True)
class BuildResult:
    entry: CacheEntry
    from_cache: bool
    seconds: float

    @property
    def instead_of(self) -> str:
        """Why it is not of the bundle's better graph; "" where that was not tried."""
        return self.entry.manifest.facts.get(FACT_INSTEAD, "")


@dataclass(frozen=True)
class BuildControl:
    """How a build is bounded and watched."""

    limits: ChildLimits = field(default_factory=ChildLimits)
    progress: Progress = ignore
    cancelled: Callable[[], bool] = never
    in_use: tuple[str, ...] = ()  # key digests eviction must not touch
    instead_of: str = ""  # why no engine was built of the bundle's better graph


def build_engine(
    directory: Path, bundle: Bundle, recipe: Recipe, cache: EngineCache, control: BuildControl
) -> BuildResult:
    """The engine of `bundle` (lying in `directory`) by this recipe. Blocking.

    Raises EngineFault with the child's last words, Exhausted (time, memory, disk), Cancelled,
    ArtifactInvalid (the bundle's graph is damaged), NoFusedKernel (of a native graph).
    """
    started = time.monotonic()
    key = build_key(bundle, recipe)
    if entry := cache.find(key.digest):
        return BuildResult(entry, True, time.monotonic() - started)
    with cache.building(key.digest, control.cancelled) as staging:
        # Another process may have finished it while this one waited for the lock.
        if entry := cache.find(key.digest):
            return BuildResult(entry, True, time.monotonic() - started)
        _check_room(staging, bundle, recipe)
        facts = _run(directory, recipe, staging, cache.kept(recipe), control)
        if control.instead_of:
            facts[FACT_INSTEAD] = control.instead_of
        entry = cache.commit(staging / _RESULT_DIR, key, facts)
    cache.evict((*control.in_use, key.digest))
    seconds = time.monotonic() - started
    log.info("engine.built", extra={"key": short(key.digest), "seconds": round(seconds, 3)})
    return BuildResult(entry, False, seconds)


def _run(
    directory: Path, recipe: Recipe, staging: Path, kept: Path, control: BuildControl
) -> dict[str, str]:
    result_dir = staging / _RESULT_DIR
    result_dir.mkdir()
    recipe_path = staging / "recipe.json"
    recipe_path.write_bytes(canonical_json(recipe))
    facts = run_child(
        _CHILD,
        [str(directory), str(recipe_path), str(result_dir), str(kept)],
        what=f"the engine build of {directory}",
        log_path=staging / "build.log",
        limits=control.limits,
        progress=control.progress,
        cancelled=control.cancelled,
    )
    return {str(name): str(value) for name, value in facts.items()}


def _check_room(staging: Path, bundle: Bundle, recipe: Recipe) -> None:
    """Refuses a build that cannot end well before it fills the disk. Raises Exhausted."""
    need = build_disk_bytes(sum(f.size for f in graph_files(bundle)), flat(recipe))
    disk = os.statvfs(staging)
    free = disk.f_bavail * disk.f_frsize
    if free < need:
        raise Exhausted(
            f"building the engine may take {need >> 20} MiB and {staging.parent} has "
            f"{free >> 20} MiB free; free some space or move the engine cache"
        )
