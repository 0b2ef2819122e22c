"""The TensorRT build: parse, one engine with two profiles, and nothing believed that was not said.

    OUT/engine.plan      the model
    OUT/sampling.plan    what shortlists its logits

In a child process: parser and builder are native code that a graph can take down. What TensorRT
only warns of, or passes over (a dropped input, a dropped profile, an empty file), is an error here.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from remora_agent.engine.recipe import GpuBuild, Recipe, dialect_of, graph_file
from remora_agent.engine.trt import sampling, timing
from remora_agent.engine.trt.files import (
    FACT_LAYERS,
    FACT_WARNINGS,
    PLAN,
    EngineFacts,
    Profile,
    written,
)
from remora_agent.engine.trt.log import BuildLog
from remora_agent.engine.trt.module import TRT_BACKENDS, TrtModule, load_module
from remora_agent.engine.trt.monitor import Monitor
from remora_agent.engine.trt.positions import choose_positions
from remora_agent.engine.trt.profiles import Range, check_capacity, profiles_of, ranges
from remora_agent.engine.trt.sampling_graph import sampling_graph
from remora_agent.host import Progress
from remora_contract.bundle import Bundle, GraphDialect
from remora_contract.errors import (
    EngineFault,
    NoFusedKernel,
    Refused,
    RequestInvalid,
    Unsupported,
)
from remora_contract.graph_lint import findings
from remora_contract.trt_memory import SHORTLIST, WATCHED, SamplingSize

log = logging.getLogger(__name__)

_MAX_QUOTED = 3  # lines of the builder in an error
# What the builder says where no kernel exists.
_NO_KERNEL = ("not supported by a dedicated kernel", "Could not find any implementation")
# Operators that the native dialect has and the legacy one spells out.
_FUSED = frozenset({"Attention", "RotaryEmbedding", "RMSNormalization", "TensorScatter"})


def build_trt(
    bundle_dir: Path,
    bundle: Bundle,
    recipe: Recipe,
    out_dir: Path,
    progress: Progress,
    timing_cache: Path | None = None,
) -> dict[str, Any]:
    """Writes the engine into `out_dir`; the facts that loading needs. In a child process.

    Raises EngineFault (the graph breaks our rules, or TensorRT does not take it), NoFusedKernel
    (of the native graph, whose bundle may hold another), Unsupported (no module), Refused (another
    version than the recipe's), ArtifactInvalid.
    """
    build = recipe.gpu
    if build is None:
        raise RequestInvalid(f"a recipe of {recipe.backend} must say for which GPU")
    module = _module(recipe)
    progress("checking the graph", 0.02)
    path, dialect = bundle_dir / graph_file(recipe), dialect_of(bundle, recipe)
    model = check(path, bundle, dialect)
    graph = model.graph
    profiles = profiles_of(build.rows, bundle.graph.context, build.prefill_tokens)
    check_capacity(graph, bundle.graph, profiles)
    said = BuildLog()
    work = _Work(module, said, said.attach(module.trt), dialect)
    progress("parsing the graph", 0.05)
    network = work.parse(model, path)
    monitor = Monitor(progress, 0.1, 0.95)
    config = work.configure(build, bundle, monitor.attach(module.trt))
    if module.api.timing_cache:
        timing.use(config, timing_cache)
    work.add_profiles(config, bundle, graph, profiles)
    plan = work.serialized(network, config)
    if module.api.timing_cache:
        timing.keep(config, timing_cache)
    progress("writing the engine", 0.97)
    (out_dir / PLAN).write_bytes(plan)
    described = _described(network, said)  # before another build says its sizes
    second = Monitor(progress, 0.97, 0.99).attach(module.trt)
    shortlists = _build_sampling(work, build, bundle, out_dir, second)
    facts = EngineFacts(profiles, bundle.graph.context, bundle.graph.max_bank_rank)
    return written(facts) | shortlists | described


def _build_sampling(
    work: _Work, build: GpuBuild, bundle: Bundle, out_dir: Path, monitor: Any
) -> dict[str, str]:
    """Writes the engine of the sampling graph, with the builder of the model's, as TensorRT has
    one logger a process; the facts that loading needs."""
    vocab = bundle.decoder.vocab
    size = SamplingSize(vocab, min(SHORTLIST, vocab), WATCHED)
    model = sampling_graph(vocab, size.shortlist)
    network = work.parse(model, out_dir / "sampling.onnx")
    config = work.configure(build, bundle, monitor)
    work.add_profile(config, 0, "sampling", sampling_ranges(size, build.rows))
    plan = work.serialized(network, config)
    (out_dir / sampling.PLAN).write_bytes(plan)
    return sampling.written(size)


def sampling_ranges(size: SamplingSize, rows: int) -> dict[str, Range]:
    """By input name: 1 to `rows` rows; what a row watches is always padded to its most."""
    widths = {"logits": size.vocab, "watched_ids": size.watched, "temperature": 1}
    return {name: Range((1, w), (rows, w), (rows, w)) for name, w in widths.items()}


def set_flags(module: TrtModule, config: Any, dtype: str) -> None:
    flags: Any = module.trt.BuilderFlag
    if dtype == "float32":
        config.clear_flag(flags.TF32)  # 10 bits of mantissa are not float32
    if module.api.user_allocation:
        config.set_flag(flags.REQUIRE_USER_ALLOCATION)


def check(path: Path, bundle: Bundle, dialect: GraphDialect) -> onnx.ModelProto:
    """What is built of the portable graph, without its weights. Raises EngineFault listing what
    breaks the rules."""
    model = ir.load(path)
    if broken := findings(model, dialect):
        raise EngineFault(
            f"{path} breaks the rules of portable graphs, so no engine is built of it: "
            f"{_quoted(broken)}; export the checkpoint again"
        )
    choose_positions(model, bundle.decoder.hidden)
    built: onnx.ModelProto = ir.to_proto(model)
    return built


def _module(recipe: Recipe) -> TrtModule:
    for backend in TRT_BACKENDS:
        if backend == recipe.backend:
            module = load_module(backend)
            if module.version != recipe.backend_version:
                raise Refused(
                    f"{backend} is {module.version} now and was {recipe.backend_version} when the "
                    "build began: start again"
                )
            return module
    raise Unsupported(f"{recipe.backend} is none of {', '.join(TRT_BACKENDS)}")


class _Work:
    """One build's native objects; `logger` outlives all of them."""

    def __init__(
        self, module: TrtModule, said: BuildLog, logger: Any, dialect: GraphDialect
    ) -> None:
        self._module, self._said, self._logger = module, said, logger
        self._dialect = dialect
        self._trt: Any = module.trt
        self._builder = self._trt.Builder(logger)
        self._parsers: list[Any] = []  # they own what their networks refer to

    def parse(self, model: onnx.ModelProto, path: Path) -> Any:
        """The network; weights outside the model lie beside `path`. Raises NoFusedKernel,
        EngineFault, also when it has not the graph's inputs and outputs."""
        graph = model.graph
        flags = 0
        if self._module.api.strong_typing == "flag":
            flags = 1 << int(self._trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = self._builder.create_network(flags)
        parser = self._trt.OnnxParser(network, self._logger)
        self._parsers.append(parser)
        parsed = parser.parse(model.SerializeToString(), str(path))
        refused = [parser.get_error(i) for i in range(parser.num_errors)]
        if not parsed or refused:
            errors = [str(e) for e in refused]
            if refused and all(str(e.node_operator()) in _FUSED for e in refused):
                self._refuse_fused(errors)
            raise self._fault("cannot read the graph", errors)
        inputs = [network.get_input(i).name for i in range(network.num_inputs)]
        outputs = [network.get_output(i).name for i in range(network.num_outputs)]
        if not network.num_layers or not outputs:
            raise self._fault("found nothing in the graph", [])
        for kind, have, need in (
            ("inputs", inputs, [v.name for v in graph.input]),
            ("outputs", outputs, [v.name for v in graph.output]),
        ):
            if have != need:
                lost = sorted(set(need) ^ set(have)) or ["in another order"]
                raise self._fault(f"does not see the graph's {kind}", [_quoted(lost)])
        self._refuse_fatal()
        return network

    def configure(self, build: GpuBuild, bundle: Bundle, monitor: Any) -> Any:
        """Strongly typed needs no precision; the rest is the target, the workspace, exactness."""
        trt, config = self._trt, self._builder.create_builder_config()
        config.progress_monitor = monitor
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        set_flags(self._module, config, bundle.graph.dtype)
        if build.workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, build.workspace_bytes)
        if self._module.api.targets:
            self._set_targets(config, build.processors)
        return config

    def _set_targets(self, config: Any, processors: tuple[int, ...]) -> None:
        """A processor that the module has no name for can only be the one in this machine."""
        known = self._trt.ComputeCapability
        names = [f"SM{p}" if p in self._module.api.targets else "CURRENT" for p in processors]
        config.num_compute_capabilities = len(names)
        for i, name in enumerate(names):
            if not config.set_compute_capability(getattr(known, name), i):
                raise self._fault(f"cannot build for {name}", self._said.errors)

    def add_profiles(
        self,
        config: Any,
        bundle: Bundle,
        graph: onnx.GraphProto,
        profiles: tuple[Profile, ...],
    ) -> None:
        """Raises EngineFault for one that TensorRT drops."""
        rank, vocab = bundle.graph.max_bank_rank, bundle.decoder.vocab
        for wanted, profile in enumerate(profiles):
            shapes = ranges(graph, profile, rank, vocab)
            self.add_profile(config, wanted, profile.kind, shapes)

    def add_profile(self, config: Any, wanted: int, kind: str, ranges: dict[str, Range]) -> None:
        """At index `wanted`. Raises EngineFault when TensorRT drops it."""
        shapes = self._builder.create_optimization_profile()
        for name, r in ranges.items():
            shapes.set_shape(name, r.least, r.typical, r.most)
        if config.add_optimization_profile(shapes) != wanted:
            raise self._fault(f"drops the {kind} profile", self._said.errors)

    def serialized(self, network: Any, config: Any) -> memoryview:
        """The engine's bytes. Raises NoFusedKernel, EngineFault."""
        engine = self._builder.build_serialized_network(network, config)
        if engine is None:
            self._refuse_fused([e for e in self._said.errors if any(k in e for k in _NO_KERNEL)])
            raise self._fault("cannot build the graph", self._said.errors)
        self._refuse_fatal()
        return memoryview(engine)

    def _refuse_fused(self, lines: list[str]) -> None:
        """`lines` say that a kernel is missing. Nothing of the legacy graph, which needs none that
        is special."""
        if lines and self._dialect == "native":
            raise NoFusedKernel(
                f"{self._name} has no fused attention for the native graph ({_quoted(lines)})"
            )

    def _refuse_fatal(self) -> None:
        if dropped := self._said.dropped:
            raise self._fault("would leave out a part of the graph", dropped)

    def _fault(self, what: str, lines: list[str]) -> EngineFault:
        return EngineFault(f"{self._name} {what}: {_quoted(lines) or 'it does not say why'}")

    @property
    def _name(self) -> str:
        return f"{self._module.backend} {self._module.version}"


def _described(network: Any, said: BuildLog) -> dict[str, str]:
    """What people want to know of an engine: kinds of layers before fusion, sizes, warnings."""
    kinds = Counter(_kind(network.get_layer(i)) for i in range(network.num_layers))
    if said.unknown:
        log.warning("engine.build_warnings", extra={"lines": said.unknown[:_MAX_QUOTED]})
    return {
        FACT_LAYERS: json.dumps(dict(sorted(kinds.items()))),
        FACT_WARNINGS: json.dumps(said.unknown),
        **{name: str(size) for name, size in sorted(said.sizes.items())},
    }


def _kind(layer: Any) -> str:
    return str(layer.type).rpartition(".")[2]


def _quoted(lines: list[str]) -> str:
    more = f" (and {len(lines) - _MAX_QUOTED} more)" if len(lines) > _MAX_QUOTED else ""
    return "; ".join(lines[:_MAX_QUOTED]) + more
