"""Where the host's engines come from: build, probe and load of one bundle with fixed options.

Owns the engine cache and the memory estimate. Knows no adapters by name and no requests.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import psutil

from remora_agent.engine.build import BuildResult, ignore, never
from remora_agent.engine.cache import CacheEntry, EngineCache
from remora_agent.engine.memory import (
    bank_bytes,
    engine_bytes,
    fits,
    int8_prefill_bytes,
    kv_bytes,
    row_slot_bytes,
)
from remora_agent.engine.opening import (
    EngineOptions,
    ensure_built,
    int8_file,
    limits_of,
    load_engine,
)
from remora_agent.engine.probe import probe_in_child
from remora_agent.engine.protocol import Engine
from remora_agent.host import BuildOutcome, Progress
from remora_contract.bundle import GRAPH_FILE, Bundle, load_bundle, verify_files
from remora_contract.errors import Refusal

log = logging.getLogger(__name__)

_LOG_NAME = "probe.log"
_KEPT = 3  # last used engines that eviction leaves: the running one, the next, the one before


class EngineSource(Protocol):
    """What a host needs of engines; blocking. Errors as `remora_agent.engine.opening` raises."""

    def build(self, bundle_dir: Path, progress: Progress) -> BuildOutcome: ...

    def probe(self, bundle_dir: Path, adapter_dirs: Sequence[Path], progress: Progress) -> None: ...

    def load(self, bundle_dir: Path) -> Engine:
        """Of a bundle that was built before; builds it otherwise."""
        ...

    def memory_refusals(self, bundle_dir: Path, available_bytes: int) -> list[Refusal]:
        """Empty when one more engine of this bundle fits."""
        ...


def default_cache() -> Path:
    """Where a person's own agent keeps built engines."""
    return Path.home() / ".cache" / "remora" / "engines"


def available_memory() -> int:
    """Bytes a process may take without swapping."""
    return int(psutil.virtual_memory().available)


@dataclass(frozen=True)
class EngineSettings:
    cache_dir: Path = field(default_factory=default_cache)
    cache_bytes: int = 32 << 30
    memory_floor_bytes: int = 256 << 20  # stays free on the device whatever is loaded
    options: EngineOptions = field(default_factory=EngineOptions)


class CachedEngines:
    """Engines of the backends that `remora_agent.engine.opening` knows."""

    def __init__(
        self,
        settings: EngineSettings,
        cancelled: Callable[[], bool] = never,
        available_bytes: Callable[[], int] = available_memory,
    ) -> None:
        """`cancelled` is asked during builds. Raises Exhausted when the cache's disk is full."""
        self._settings = settings
        self._available_bytes = available_bytes
        self._cancelled = cancelled
        self._cache = EngineCache(settings.cache_dir, settings.cache_bytes)
        self._recent: tuple[str, ...] = ()

    def build(self, bundle_dir: Path, progress: Progress) -> BuildOutcome:
        result = self._built(bundle_dir, progress)
        return BuildOutcome(result.entry.manifest.digest, result.from_cache, result.seconds)

    def probe(self, bundle_dir: Path, adapter_dirs: Sequence[Path], progress: Progress) -> None:
        options = self._settings.options
        built = self._built(bundle_dir, progress)
        with tempfile.TemporaryDirectory(prefix="remora-probe-") as folder:
            probe_in_child(
                built.entry,
                bundle_dir,
                adapter_dirs,
                options,
                Path(folder) / _LOG_NAME,
                options.build_limits,
                progress,
                self._cancelled,
            )

    def load(self, bundle_dir: Path) -> Engine:
        built = self._built(bundle_dir, ignore)
        bundle = load_bundle(bundle_dir)
        return load_engine(built.entry, bundle, self._affordable(built.entry, bundle))

    def memory_refusals(self, bundle_dir: Path, available_bytes: int) -> list[Refusal]:
        bundle = load_bundle(bundle_dir)
        asked = self._settings.options.prefill == "int8"
        return self._refusals(bundle, available_bytes, with_int8=asked)

    def _affordable(self, entry: CacheEntry, bundle: Bundle) -> EngineOptions:
        """The options, without int8 prompts where these were left to the agent and do not fit."""
        options = self._settings.options
        if options.prefill != "auto" or not int8_file(entry):
            return options
        refusals = self._refusals(bundle, self._available_bytes(), with_int8=True)
        if refusals:
            log.info("engine.prefill_plain", extra={"why": str(refusals[0])})
        return replace(options, prefill="plain") if refusals else options

    def _refusals(self, bundle: Bundle, available_bytes: int, with_int8: bool) -> list[Refusal]:
        limits = limits_of(bundle, self._settings.options)
        engine = engine_bytes(bundle.decoder, bundle.graph)
        if with_int8:
            engine += int8_prefill_bytes(bundle.decoder)
        rank = limits.max_bank_rank
        return fits(
            engine_bytes=engine,
            kv_bytes=kv_bytes(bundle.decoder, limits.rows, limits.context),
            bank_bytes=bank_bytes(bundle.decoder, rank, graph=bundle.graph)
            + row_slot_bytes(bundle.decoder, limits.rows, rank),
            floor_bytes=self._settings.memory_floor_bytes,
            available_bytes=available_bytes,
        )

    def _built(self, bundle_dir: Path, progress: Progress) -> BuildResult:
        options = self._settings.options
        result = ensure_built(
            bundle_dir, self._cache, options, progress, self._cancelled, self._recent
        )
        key = result.entry.manifest.key.digest
        self._recent = (*(k for k in self._recent if k != key), key)[-_KEPT:]
        return result


def verify_small_files(bundle_dir: Path, bundle: Bundle) -> None:
    """Everything but the graph, which an engine build verifies. Raises ArtifactInvalid."""
    small = tuple(f for f in bundle.files if not f.path.startswith(GRAPH_FILE))
    verify_files(bundle_dir, small)
