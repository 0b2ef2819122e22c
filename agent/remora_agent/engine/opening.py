"""From a bundle directory to a running engine: build or cache hit, check of memory, load.

The one place that names concrete backends; everything else receives an `Engine`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from remora_agent.engine import places
from remora_agent.engine.backends import (
    BackendName,
    Overlap,
    check_backend,
    check_overlap,
    check_tensorrt,
)
from remora_agent.engine.build import BuildControl, BuildResult, build_engine, ignore, never
from remora_agent.engine.cache import CacheEntry, EngineCache
from remora_agent.engine.child import ChildLimits
from remora_agent.engine.prefill import PrefillChoice, check_choice, chosen
from remora_agent.engine.protocol import Engine, EngineLimits
from remora_agent.engine.recipe import Recipe, build_key
from remora_agent.host import Progress
from remora_contract.bundle import Bundle, load_bundle
from remora_contract.dialects import dialect_refusals, to_build
from remora_contract.engine import flat
from remora_contract.engine_memory import kv_bytes
from remora_contract.errors import Incompatible, NoFusedKernel, RequestInvalid, Unsupported
from remora_contract.memory_need import MAX_ROWS
from remora_contract.trt_memory import GpuMemory

log = logging.getLogger(__name__)

MAX_THREADS = 1024


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is built and sized."""

    rows: int = 8  # sequences in flight
    context: int | None = None  # tokens a row holds; None: what the bundle was exported for
    threads: int | None = None  # None: as many as there are physical cores
    accuracy_level: int = 4  # of int4 products: 4 fast, 1 keeps activations in float32
    prefill: PrefillChoice = "auto"  # how prompts are computed: see engine.prefill
    backend: BackendName = "onnxruntime"
    overlap: Overlap = "auto"  # whether a prompt is read beside decode steps, where that can be
    build_limits: ChildLimits = field(default_factory=ChildLimits)

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= MAX_ROWS:
            raise RequestInvalid(f"rows must be 1..{MAX_ROWS}, not {self.rows}")
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise RequestInvalid(f"threads must be 1..{MAX_THREADS}, not {self.threads}")
        if self.accuracy_level not in (0, 1, 4):
            raise RequestInvalid(f"accuracy_level must be 0, 1 or 4, not {self.accuracy_level}")
        check_choice(self.prefill, self.accuracy_level)
        check_backend(self.backend)
        check_overlap(self.overlap)
        if self.backend != "onnxruntime":
            self._check_gpu()

    def _check_gpu(self) -> None:
        """Raises RequestInvalid for what only ONNX Runtime does."""
        if self.threads is not None:
            raise RequestInvalid(
                f"threads are the processor's and backend {self.backend} computes on the GPU; "
                "leave them out"
            )
        if self.prefill == "int8":
            raise RequestInvalid(
                f"prefill int8 is made by backend onnxruntime and not by {self.backend}; give "
                "prefill plain or auto"
            )


def ensure_built(
    bundle_dir: Path,
    cache: EngineCache,
    options: EngineOptions,
    progress: Progress = ignore,
    cancelled: Callable[[], bool] = never,
    in_use: tuple[str, ...] = (),
) -> BuildResult:
    """The built engine of a bundle, from the cache or made now in a child process; see
    `build_first`. Blocking.

    `in_use` are key digests (`entry.manifest.key.digest`) that eviction must leave. Raises
    EngineFault, Exhausted, Cancelled, ArtifactInvalid, DocumentInvalid, Incompatible (a dialect of
    the graph that the backend does not take), and what `recipe_of` raises.
    """
    control = BuildControl(options.build_limits, progress, cancelled, in_use)
    bundle = load_bundle(bundle_dir)
    return build_first(bundle_dir, bundle, recipes_of(bundle, options), cache, control)


def build_first(
    bundle_dir: Path,
    bundle: Bundle,
    recipes: tuple[Recipe, ...],
    cache: EngineCache,
    control: BuildControl,
) -> BuildResult:
    """The engine by the first recipe that is in the cache, else by the first that can be built: a
    later one only where the backend has no fused kernel for the graph of those before. So an engine
    of the second graph that lies in the cache tells that the first one was tried. Raises as
    `build_engine` does."""
    found = next((r for r in recipes if cache.find(build_key(bundle, r).digest)), None)
    if found is not None:
        return build_engine(bundle_dir, bundle, found, cache, control)
    for recipe in recipes[:-1]:
        seen = _Reached(control.progress)
        try:
            watched = replace(control, progress=seen)
            return build_engine(bundle_dir, bundle, recipe, cache, watched)
        except NoFusedKernel as e:
            log.warning("engine.second_graph", extra={"reason": str(e)})
            seen("building the legacy graph instead", 0.0)
            control = replace(control, progress=seen.rest(), instead_of=str(e))
    try:
        return build_engine(bundle_dir, bundle, recipes[-1], cache, control)
    except NoFusedKernel as e:
        advice = "export the checkpoint again with --dialect both or legacy"
        raise NoFusedKernel(f"{e}; {advice}") from e


@dataclass
class _Reached:
    """Passes progress on from `begin` to 1 and keeps how far it came, so that it never goes back
    over two builds."""

    progress: Progress
    begin: float = 0.0
    reached: float = 0.0

    def __call__(self, phase: str, done: float) -> None:
        self.reached = max(self.reached, self.begin + done * (1.0 - self.begin))
        self.progress(phase, self.reached)

    def rest(self) -> _Reached:
        return _Reached(self.progress, self.reached, self.reached)


def recipe_of(bundle: Bundle, options: EngineOptions, processors: tuple[int, ...] = ()) -> Recipe:
    """What to build. `processors` (86 for compute capability 8.6): ahead of time for other GPUs.

    Raises Unsupported (the backend is not installed, or does not build ahead of time), Refused (no
    GPU), Exhausted (too small a GPU), Incompatible, RequestInvalid.
    """
    if options.backend == "onnxruntime":
        from remora_agent.engine.ort import builder

        if processors:
            raise Unsupported("backend onnxruntime builds for this machine's processor only")
        limits_of(bundle, options)  # what could not be loaded is not built
        level = options.accuracy_level
        return builder.recipe(level, chosen(options.prefill, bundle, level))
    from remora_agent.engine.trt.recipe import recipe

    context = limits_of(bundle, options).context
    return recipe(check_tensorrt(options.backend), bundle, options.rows, context, processors)


def this_device(options: EngineOptions) -> tuple[dict[str, str], GpuMemory | None]:
    """The fields of every recipe on this device, for those who plan (`prefill` is the choice), and
    the memory of its GPU, where engines take that."""
    if options.backend != "onnxruntime":
        from remora_agent.engine.trt.recipe import device_fields

        return device_fields(check_tensorrt(options.backend), options.rows)
    from remora_agent.engine.ort import builder

    return flat(builder.recipe(options.accuracy_level, options.prefill)), None


def recipes_of(
    bundle: Bundle, options: EngineOptions, processors: tuple[int, ...] = ()
) -> tuple[Recipe, ...]:
    """What may be built of the bundle's graphs, the better one first. Raises Incompatible when the
    backend takes none of them, and as `recipe_of` does."""
    recipe = recipe_of(bundle, options, processors)
    name, version = recipe.backend, recipe.backend_version
    if refusals := dialect_refusals(bundle.dialects, {name: version}):
        raise Incompatible(refusals)
    own = bundle.graph.dialect
    return tuple(
        recipe if dialect == own else replace(recipe, dialect=dialect)
        for dialect in to_build(bundle.dialects, name, version)
    )


def open_engine(
    bundle_dir: Path,
    cache: EngineCache,
    options: EngineOptions | None = None,
    progress: Progress = ignore,
    cancelled: Callable[[], bool] = never,
) -> Engine:
    """Builds or finds the engine of a bundle and loads it. Raises as `ensure_built` does."""
    options = options or EngineOptions()
    result = ensure_built(bundle_dir, cache, options, progress, cancelled)
    return load_engine(result.entry, load_bundle(bundle_dir), options)


def load_engine(entry: CacheEntry, bundle: Bundle, options: EngineOptions) -> Engine:
    """Loads a built engine. Raises EngineFault, RequestInvalid (context the bundle has not), and
    what `engine.trt.loading.load` raises."""
    if options.backend != "onnxruntime":
        from remora_agent.engine.trt import loading

        return loading.load(entry, bundle, options)
    from remora_agent.engine.ort.builder import FACT_BASE, FACT_PLAIN
    from remora_agent.engine.ort.engine import EngineFiles, OrtEngine, PrefillForm

    facts = entry.manifest.facts
    prefill = int8_file(entry) if options.prefill != "plain" else ""
    files = EngineFiles(
        entry.directory,
        entry.manifest.digest,
        facts.get(FACT_BASE) or None,
        facts.get(FACT_PLAIN) or None,
        PrefillForm(prefill) if prefill else None,
    )
    limits = limits_of(bundle, options)
    return OrtEngine(files, bundle.decoder, limits, options.threads, bundle.graph)


def int8_file(entry: CacheEntry) -> str:
    """The built model that reads prompts in int8; "" where the build made none."""
    from remora_agent.engine.ort.builder import FACT_PREFILL

    return entry.manifest.facts.get(FACT_PREFILL, "")


def limits_of(bundle: Bundle, options: EngineOptions) -> EngineLimits:
    """What an engine of `bundle` with these options will offer. Raises RequestInvalid."""
    context = places.context_of(options.context, bundle.graph.context)
    decoder = bundle.decoder
    return EngineLimits(
        options.rows,
        context,
        decoder.vocab,
        bundle.graph.max_bank_rank,
        scored=places.most_scored(decoder.vocab),
        hidden=decoder.hidden,
        kv_token_bytes=kv_bytes(decoder, rows=1, context=0),
        copies_kv=True,
        switch=places.switch_of(bundle, context),
    )
