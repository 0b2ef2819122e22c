"""From a built engine's folder to a running one. The only module that touches both the TensorRT and
the CUDA module; `runtime` and `module` are given by tests.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil

from remora_agent.engine import places
from remora_agent.engine.backends import Overlap
from remora_agent.engine.cache import CacheEntry
from remora_agent.engine.protocol import Engine, EngineLimits
from remora_agent.engine.trt import files, sampling
from remora_agent.engine.trt.contexts import Plan
from remora_agent.engine.trt.cuda import Cuda, load_bindings
from remora_agent.engine.trt.device import Device, DeviceSpec
from remora_agent.engine.trt.engine import TrtEngine
from remora_agent.engine.trt.kernels import KernelCache
from remora_agent.engine.trt.kv import KvShape, present_name
from remora_agent.engine.trt.module import TRT_BACKENDS, TrtBackend, TrtModule, load_module
from remora_agent.engine.trt.positions import LOGITS_INDEX, STATE_INDEX, STATES
from remora_agent.engine.trt.profiles import positions_of
from remora_contract import bank_inputs, targets
from remora_contract.bundle import Bundle
from remora_contract.errors import (
    ArtifactInvalid,
    EngineFault,
    Exhausted,
    Refusal,
    RequestInvalid,
)
from remora_contract.trt_memory import TrtSizes

log = logging.getLogger(__name__)


class RunOptions(Protocol):
    """What of `engine.opening.EngineOptions` matters here."""

    @property
    def rows(self) -> int: ...

    @property
    def context(self) -> int | None: ...

    @property
    def overlap(self) -> Overlap: ...


def load(entry: CacheEntry, bundle: Bundle, options: RunOptions) -> Engine:
    """Loads a built engine on the first GPU.

    Raises Unsupported (a module is missing), Unavailable (no GPU), Exhausted (no memory),
    RequestInvalid (rows or context beyond the build's), ArtifactInvalid, EngineFault.
    """
    backend = _backend(entry.manifest.key.recipe.backend)
    return load_on(load_bindings(), load_module(backend), entry, bundle, options)


def load_on(
    runtime: Any, module: TrtModule, entry: CacheEntry, bundle: Bundle, options: RunOptions
) -> Engine:
    """The same with the modules given."""
    facts = files.read(entry.manifest.facts, str(entry.directory))
    limits = limits_of(bundle, facts, options)
    cuda = Cuda(runtime)
    cuda.open_device()
    kernels = KernelCache(entry.kernels) if module.api.runtime_cache else None
    plan = _plan(module, entry.directory / files.PLAN, kernels)
    check_plan(plan, facts, bundle, limits)
    size = sampling.size_of(entry.manifest.facts, limits.vocab, str(entry.directory))
    short = None
    if size is not None:
        short = _plan(module, entry.directory / sampling.PLAN, kernels)
        sampling.check_plan(short, size, limits.rows)
        limits = replace(limits, shortlist=size.shortlist, watched=size.watched)
    wanted = options.overlap == "auto" and limits.rows > 1
    plans = [plan] if short is None else [plan, short]
    overlaps = _check_memory(cuda, plans, bundle, limits.rows, facts.chunk, overlaps=wanted)
    limits = replace(limits, overlaps=overlaps)
    spec = DeviceSpec(
        bundle.decoder, bundle.graph, facts, limits.rows, limits.context, size, overlaps
    )
    device = Device(cuda, plan, spec, short, kernels)
    return TrtEngine(module.backend, entry.manifest.digest, limits, device)


def _check_memory(
    cuda: Cuda, plans: list[Plan], bundle: Bundle, rows: int, chunk: int, *, overlaps: bool
) -> bool:
    """Whether prompts can be read beside decode steps, where that is wanted (`overlaps`). With the
    weights already there, which deserialising has put there. Raises Exhausted naming every part
    and what would fit."""
    scratch = max(plan.scratch_bytes for plan in plans)
    sizes = TrtSizes.of(bundle)
    more = sizes.overlap_bytes(rows, chunk, plans[0].scratch_bytes) if overlaps else 0
    pinned = _pinned(cuda, sizes, rows, chunk, overlaps=overlaps)
    plan = sizes.memory_plan(rows, 0, scratch, chunk, pinned, more)
    refused = sizes.refusals(plan, rows, cuda.available_memory(_of_system()))
    if not refused:
        return overlaps
    if not overlaps:
        raise Exhausted(str(refused[0]))
    fits = _check_memory(cuda, plans, bundle, rows, chunk, overlaps=False)
    log.info("engine.prompts_alone", extra={"why": str(refused[0])})
    return fits


def beside_refusals(entry: CacheEntry, bundle: Bundle, rows: int, of_system: int) -> list[Refusal]:
    """Empty when one more engine fits beside what runs, its prompts read alone; `of_system`: bytes
    of the system's memory that may be taken. Raises Unsupported, Unavailable."""
    facts = entry.manifest.facts
    weights = int(facts.get(files.FACT_WEIGHTS, entry.bytes))
    workspace = int(facts.get(files.FACT_ACTIVATION, 0))
    cuda = Cuda(load_bindings())
    cuda.open_device()
    chunk = files.read(facts, str(entry.directory)).chunk
    sizes = TrtSizes.of(bundle)
    pinned = _pinned(cuda, sizes, rows, chunk)
    plan = sizes.memory_plan(rows, weights, workspace, chunk, pinned)
    return sizes.refusals(plan, rows, cuda.available_memory(of_system))


def _pinned(cuda: Cuda, sizes: TrtSizes, rows: int, chunk: int, *, overlaps: bool = False) -> int:
    """Beside a GPU with memory of its own it is not the GPU's."""
    return sizes.pinned_bytes(rows, chunk, overlaps=overlaps) if cuda.shares_memory() else 0


def _of_system() -> int:
    return int(psutil.virtual_memory().available)


def limits_of(bundle: Bundle, facts: files.EngineFacts, options: RunOptions) -> EngineLimits:
    """Raises RequestInvalid."""
    context = places.context_of(options.context, bundle.graph.context)
    built = facts.profiles[facts.index("decode")].rows
    if options.rows > built:
        raise RequestInvalid(
            f"the engine was built for {built} rows, not {options.rows}; build it again for more"
        )
    decoder = bundle.decoder
    shape = KvShape.of(decoder, options.rows, bundle.graph.context, np.dtype(bundle.graph.dtype))
    return EngineLimits(
        options.rows,
        context,
        decoder.vocab,
        bundle.graph.max_bank_rank,
        scored=places.most_scored(decoder.vocab),
        hidden=decoder.hidden,
        kv_token_bytes=shape.token_bytes,
        copies_kv=True,
        switch=places.switch_of(bundle, context),
    )


def check_plan(plan: Plan, facts: files.EngineFacts, bundle: Bundle, limits: EngineLimits) -> None:
    """The engine has the tensors that the bundle promises, as large as the facts say. Raises
    ArtifactInvalid, EngineFault."""
    inputs, outputs = expected_tensors(bundle)
    # A longrope exported before there was a length reads last_index.
    if plan.inputs - {targets.LAST_INDEX} != inputs or plan.outputs != outputs:
        odd = sorted((plan.inputs ^ inputs) | (plan.outputs ^ outputs))
        raise ArtifactInvalid(
            f"the engine's tensors are not the bundle's: {odd[0]} (and {len(odd) - 1} more); "
            "build it again"
        )
    if len(facts.profiles) != plan.profiles:
        raise ArtifactInvalid(
            f"the engine has {plan.profiles} profiles, not {len(facts.profiles)}; build it again"
        )
    for index, profile in enumerate(facts.profiles):
        most = plan.most(targets.INPUT_IDS, index)
        if most != (profile.rows, profile.tokens):
            raise ArtifactInvalid(f"profile {index} takes {list(most)} tokens; build it again")
        states, logits = (plan.most(name, index) for name in (STATE_INDEX, LOGITS_INDEX))
        if (*states, *logits) != positions_of(profile, bundle.decoder.vocab):
            raise ArtifactInvalid(
                f"profile {index} gives states of {list(states)} tokens and logits of "
                f"{list(logits)}; build it again"
            )
    cache = plan.most(targets.past_key(0), facts.index("decode"))[2]
    if cache != bundle.graph.context or facts.context != cache:
        raise ArtifactInvalid(f"the engine's cache holds {cache} tokens; build it again")
    for name, dtype in (
        (targets.past_key(0), bundle.graph.dtype),
        (targets.LOGITS, "float32"),
        (STATES, "float32"),
    ):
        if plan.dtype(name) != np.dtype(dtype):
            raise EngineFault(f"the engine's {name} is {plan.dtype(name)}, not {dtype}")


def expected_tensors(bundle: Bundle) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the built graph's inputs, but for `last_index`, and outputs."""
    decoder, graph = bundle.decoder, bundle.graph
    inputs = {targets.INPUT_IDS, targets.POSITION_IDS, STATE_INDEX, LOGITS_INDEX}
    if graph.sequence_length:
        inputs.add(targets.SEQUENCE_LENGTH)
    outputs = {targets.LOGITS, STATES}
    for layer in range(decoder.layers):
        past = (targets.past_key(layer), targets.past_value(layer))
        inputs.update(past)
        outputs.update(present_name(name) for name in past)
    for layer, group in bank_inputs.places(decoder, graph):
        inputs.add(targets.lora_gate(group))
        inputs.update((targets.lora_a(layer, group), targets.lora_b(layer, group)))
    inputs.update(v.name for v in bank_inputs.vector_inputs(decoder, graph))
    return frozenset(inputs), frozenset(outputs)


def _backend(name: str) -> TrtBackend:
    for backend in TRT_BACKENDS:
        if backend == name:
            return backend
    raise ArtifactInvalid(f"an engine of {name} was given to TensorRT; build it again")


def _plan(module: TrtModule, path: Path, kernels: KernelCache | None) -> Plan:
    with _mapped(path) as data:
        return Plan(module, data, kernels)


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    """The file's pages, which the system may drop as they are read: a copy of an engine in memory
    that the GPU shares would have to fit beside the engine. Nobody shortens a file of the cache."""
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as e:  # ValueError: it is empty
        reason = getattr(e, "strerror", None) or e
        raise ArtifactInvalid(f"{path} cannot be read: {reason}; build the engine again") from e
    with data:
        yield data
