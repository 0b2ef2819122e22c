"""Where the host's engines come from: build, probe and load of one bundle with fixed options.

Owns the engine cache and the memory estimate. Knows no adapters by name and no requests.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import psutil

from remora_agent.engine.build import BuildResult, ignore, never
from remora_agent.engine.cache import CacheEntry, EngineCache
from remora_agent.engine.golden_process import ask_in_child
from remora_agent.engine.one_row import OneRow
from remora_agent.engine.opening import (
    EngineOptions,
    ensure_built,
    int8_file,
    limits_of,
    load_engine,
    recipes_of,
    this_device,
)
from remora_agent.engine.probe import probe_in_child
from remora_agent.engine.protocol import Engine
from remora_agent.engine.recipe import BuildKey, build_key, dialect_of
from remora_agent.engine.shipped import fitting, take_shipped
from remora_agent.host import Assignment, BuildOutcome, Progress
from remora_contract.bundle import Bundle, is_graph_file, load_bundle, verify_files
from remora_contract.engine import EngineKey, Wanted, flat
from remora_contract.engine_memory import (
    bank_bytes,
    engine_bytes,
    int8_prefill_bytes,
    kv_bytes,
    row_slot_bytes,
)
from remora_contract.errors import (
    EngineFault,
    Exhausted,
    InvalidInput,
    Refusal,
    Refused,
    Unsupported,
)
from remora_contract.memory_plan import MemoryPlan, Shape, plan_refusals
from remora_contract.strict import plain
from remora_contract.trt_memory import GpuMemory

log = logging.getLogger(__name__)

_LOG_NAME = "probe.log"
_KEPT = 3  # last used engines that eviction leaves: the running one, the next, the one before


class EngineSource(Protocol):
    """What a host needs of engines; blocking. Errors as `remora_agent.engine.opening` raises."""

    def build(
        self,
        bundle_dir: Path,
        progress: Progress,
        shipped: Sequence[Path] = (),
        adapter_dirs: Sequence[Path] = (),
    ) -> BuildOutcome:
        """From the cache, from one of the `shipped` folders, or built now. A shipped engine is
        proven with the adapters too: its adapter branch may be another file."""
        ...

    def key(self) -> Mapping[str, str]:
        """What of a build key holds for every bundle."""
        ...

    def gpu_memory(self) -> GpuMemory | None:
        """Of the GPU that engines take; None: they take the system's, or it is not known."""
        ...

    def wanted(self, bundle_dir: Path) -> Wanted | None:
        """The build key for this bundle; None when its engine is in the cache."""
        ...

    def missing(self, bundle_dir: Path) -> EngineKey | None:
        """Like `wanted`, as the key whose digest names the build."""
        ...

    def take(
        self, bundle_dir: Path, staged: Path, adapter_dirs: Sequence[Path], progress: Progress
    ) -> str:
        """Proves another device's engine with the adapters and takes it into the cache. "" when it
        is there, else what is wrong with it. Raises Exhausted where that could not be found out."""
        ...

    def built(self, bundle_dir: Path) -> Path | None:
        """The folder of this bundle's engine; None when it is not in the cache."""
        ...

    def probe(self, bundle_dir: Path, adapter_dirs: Sequence[Path], progress: Progress) -> None: ...

    def ask(self, assignment: Assignment, incumbent: Assignment | None, progress: Progress) -> None:
        """The assignment's golden questions, in a child process; `incumbent` serves now. Raises
        EngineFault naming the question, Unsupported for what cannot be asked here."""
        ...

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
        self._recent = self._cache.recent(_KEPT)
        self._device: tuple[Mapping[str, str], GpuMemory | None] | None = None
        self._device_unknown = ""  # why, as it was logged last
        self._rejected: dict[str, str] = {}  # folders of shipped engines that failed, and why

    def build(
        self,
        bundle_dir: Path,
        progress: Progress,
        shipped: Sequence[Path] = (),
        adapter_dirs: Sequence[Path] = (),
    ) -> BuildOutcome:
        """Nothing that is wrong with a shipped engine is raised: it is built here instead."""
        started = time.monotonic()
        taken, why = (False, "")
        if shipped:
            taken, why = self._take(bundle_dir, shipped, adapter_dirs, progress)
        result = self._built(bundle_dir, progress)
        bundle, recipe = load_bundle(bundle_dir), result.entry.manifest.key.recipe
        return BuildOutcome(
            result.entry.manifest.digest,
            result.from_cache and not taken,
            time.monotonic() - started,
            shipped=taken,
            why="; ".join(filter(None, (why, result.instead_of))),
            dialect=dialect_of(bundle, recipe) if len(bundle.dialects) > 1 else None,
        )

    def key(self) -> Mapping[str, str]:
        return self._this_device()[0]

    def gpu_memory(self) -> GpuMemory | None:
        return self._this_device()[1]

    def _this_device(self) -> tuple[Mapping[str, str], GpuMemory | None]:
        """Asked in every Sync, so found out once. A device without its GPU tells nothing."""
        if self._device is None:
            try:
                self._device = this_device(self._settings.options)
            except (Unsupported, Refused) as e:
                if str(e) != self._device_unknown:
                    log.warning("engine.key_unknown", extra={"reason": str(e)})
                self._device_unknown = str(e)
                return {}, None
        return self._device

    def wanted(self, bundle_dir: Path) -> Wanted | None:
        bundle, keys = load_bundle(bundle_dir), self._keys(bundle_dir)
        if self._found(keys):
            return None
        first, *others = (flat(key.recipe) for key in keys)
        files = {f.path: f.digest for f in bundle.files}
        return Wanted(files, first, is_whole=True, others=tuple(others))

    def missing(self, bundle_dir: Path) -> EngineKey | None:
        keys = self._keys(bundle_dir)
        return None if self._found(keys) else keys[0].plain()

    def take(
        self, bundle_dir: Path, staged: Path, adapter_dirs: Sequence[Path], progress: Progress
    ) -> str:
        fits = fitting([staged], self._keys(bundle_dir))
        if fits is None:
            return "its build key is not the device's"
        _, key = fits

        def prove(entry: CacheEntry) -> None:
            self._prove(entry, bundle_dir, adapter_dirs, progress)

        try:
            take_shipped(staged, key, self._cache, prove, self._cancelled)
        except (EngineFault, InvalidInput) as e:
            return str(e)
        self._cache.evict((*self._recent, key.digest))
        return ""

    def built(self, bundle_dir: Path) -> Path | None:
        entry = self._found(self._keys(bundle_dir))
        return None if entry is None else entry.directory

    def _keys(self, bundle_dir: Path) -> tuple[BuildKey, ...]:
        """What would be built of the bundle's graphs, the better one first."""
        bundle = load_bundle(bundle_dir)
        recipes = recipes_of(bundle, self._settings.options)
        return tuple(build_key(bundle, recipe) for recipe in recipes)

    def _found(self, keys: tuple[BuildKey, ...]) -> CacheEntry | None:
        entries = (self._cache.find(key.digest) for key in keys)
        return next((e for e in entries if e is not None), None)

    def _take(
        self,
        bundle_dir: Path,
        shipped: Sequence[Path],
        adapter_dirs: Sequence[Path],
        progress: Progress,
    ) -> tuple[bool, str]:
        """Whether a shipped engine is now in the cache, and why not."""
        keys = self._keys(bundle_dir)
        if self._found(keys):
            return False, "it was built before"
        fits = fitting(shipped, keys)
        if fits is None:
            return False, "no shipped engine has this device's build key"
        directory, key = fits
        why = self._rejected.get(directory.name)
        if why is not None:
            return False, why

        def prove(entry: CacheEntry) -> None:
            self._prove(entry, bundle_dir, adapter_dirs, progress)

        try:
            take_shipped(directory, key, self._cache, prove, self._cancelled)
        except (EngineFault, InvalidInput, Exhausted) as e:
            why = f"the shipped engine was not used: {e}"
            log.warning("engine.rejected", extra={"path": str(directory), "reason": str(e)})
            self._rejected[directory.name] = why
            return False, why
        return True, "its build key is the device's"

    def probe(self, bundle_dir: Path, adapter_dirs: Sequence[Path], progress: Progress) -> None:
        self._prove(self._built(bundle_dir, progress).entry, bundle_dir, adapter_dirs, progress)

    def ask(self, assignment: Assignment, incumbent: Assignment | None, progress: Progress) -> None:
        sides = [None if a is None else self._side(a, progress) for a in (assignment, incumbent)]
        with tempfile.TemporaryDirectory(prefix="remora-golden-") as folder:
            ask_in_child(
                assignment.golden,
                sides,
                Path(folder),
                self._settings.options.build_limits,
                progress,
                self._cancelled,
            )

    def _side(self, assignment: Assignment, progress: Progress) -> dict[str, Any]:
        """As golden_child.Side."""
        directory = assignment.bundle_directory
        entry = self._built(directory, progress).entry
        options = self._affordable(entry, load_bundle(directory))
        return {
            "engine_directory": str(entry.directory),
            "bundle_directory": str(directory),
            "adapters": {a.name: str(a.directory) for a in assignment.adapters},
            "use_cases": plain(assignment.use_cases),
            "options": plain(OneRow.of(options)),
        }

    def _prove(
        self,
        entry: CacheEntry,
        bundle_dir: Path,
        adapter_dirs: Sequence[Path],
        progress: Progress,
    ) -> None:
        options = self._affordable(entry, load_bundle(bundle_dir))
        with tempfile.TemporaryDirectory(prefix="remora-probe-") as folder:
            probe_in_child(
                entry,
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
        bundle, options = load_bundle(bundle_dir), self._settings.options
        if options.backend != "onnxruntime":
            from remora_agent.engine.trt.loading import beside_refusals

            entry = self._built(bundle_dir, ignore).entry
            return beside_refusals(entry, bundle, options.rows, available_bytes)
        return self._refusals(bundle, available_bytes, with_int8=options.prefill == "int8")

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
        """Of an engine of ONNX Runtime."""
        limits, decoder = limits_of(bundle, self._settings.options), bundle.decoder
        weights = engine_bytes(decoder, bundle.graph)
        rank = limits.max_bank_rank
        plan = MemoryPlan(
            weights=weights + (int8_prefill_bytes(decoder) if with_int8 else 0),
            kv=kv_bytes(decoder, limits.rows, limits.context),
            bank=bank_bytes(decoder, rank, graph=bundle.graph)
            + row_slot_bytes(decoder, limits.rows, rank),
            workspace=0,
            logits=0,  # and what layers take: small beside the rest, and not known before
            floor=self._settings.memory_floor_bytes,
        )
        return plan_refusals(plan, Shape(limits.rows, limits.context, rank), available_bytes)

    def _built(self, bundle_dir: Path, progress: Progress) -> BuildResult:
        options = self._settings.options
        result = ensure_built(
            bundle_dir, self._cache, options, progress, self._cancelled, self._recent
        )
        key = result.entry.manifest.key.digest
        self._recent = (*(k for k in self._recent if k != key), key)[-_KEPT:]
        return result


def verify_small_files(bundle_dir: Path, bundle: Bundle) -> None:
    """Everything but the graphs, which an engine build verifies. Raises ArtifactInvalid."""
    small = tuple(f for f in bundle.files if not is_graph_file(f.path))
    verify_files(bundle_dir, small)
