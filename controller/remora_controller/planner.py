"""What a release would cost each device, and why some cannot take it. Pure.

`remora plan` shows exactly what `rollout start` checks. A device already holds the chunks of the
bundle and the adapters it reports, so a new adapter ships as its own few chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from remora_contract.artifact import Manifest
from remora_contract.bundle import GRAPH_FILE, GraphDialect
from remora_contract.compat import constraint_refusals, quant_refusals
from remora_contract.dialects import dialect_refusals, dialects_in, to_build
from remora_contract.digests import short
from remora_contract.engine import (
    DIALECT,
    PREFILL,
    Build,
    Offered,
    Ship,
    Wanted,
    build_disk_bytes,
    choose,
    offered_in,
    prefill_of,
)
from remora_contract.errors import Refusal
from remora_contract.memory_need import memory_need_refusals, peak_memory_bytes
from remora_contract.release import Release
from remora_contract.release_rules import document_refusals
from remora_controller.domain import Device, Wave
from remora_controller.room import Room, sizing_of
from remora_controller.waves import assign_waves, wave_order, wave_sizes


@dataclass(frozen=True)
class Contents:
    """A release with the manifests of its artifacts, and of what devices may hold already."""

    release: Release
    manifests: Mapping[str, Manifest]  # at least the release's own, by digest

    @cached_property
    def engines(self) -> tuple[Offered, ...]:
        return tuple(offered_in(d, self.manifests[d].facts) for d in self.release.engines or ())

    @cached_property
    def engine_plans(self) -> dict[frozenset[tuple[str, str]], EnginePlan]:
        """By what a device told of its build key: a fleet has many devices and few classes."""
        return {}


@dataclass(frozen=True)
class EnginePlan:
    """Where the device's engine comes from, and why; `digest` of one that is shipped, or fetched
    and there already. What another device built is `sharing.forecast`'s to say."""

    what: Literal["kept", "shipped", "built", "fetched", "waits"]
    why: str
    digest: str | None = None
    source: str | None = None  # fetched, waits: the device that builds or built it
    bytes: int | None = None  # fetched: None while it is not built
    shares: bool = False  # built: for others too


@dataclass(frozen=True)
class DevicePlan:
    device_id: str
    hostname: str
    wave: int | None  # None when refused
    ship_bytes: int
    engine: EnginePlan
    build_s: float | None  # None: no device like it has built one yet
    peak_disk_bytes: int
    refusals: tuple[Refusal, ...]
    peak_memory_bytes: int | None = None  # None: not known

    @property
    def builds_engine(self) -> bool:
        return self.engine.what == "built"

    @property
    def is_pinned(self) -> bool:
        """Left out on purpose, and not because it could not take the release."""
        return any(r.code == "pinned" for r in self.refusals)


@dataclass(frozen=True)
class Plan:
    devices: tuple[DevicePlan, ...]  # in wave order, refused ones last
    waves: tuple[int, ...]  # devices per wave

    @property
    def total_bytes(self) -> int:
        return sum(d.ship_bytes for d in self.devices if d.wave is not None)

    @property
    def refused(self) -> tuple[DevicePlan, ...]:
        return tuple(d for d in self.devices if d.wave is None)


def make_plan(
    devices: Sequence[Device],
    online: frozenset[str],
    contents: Contents,
    build_seconds: Mapping[str, float],
    waves: tuple[Wave, ...],
    stratify: tuple[str, ...] = (),
) -> Plan:
    """`build_seconds`: a typical engine build by device model. `stratify`: the label keys over
    whose values every wave is spread; `device_model` and `architecture` are known without."""
    refusals = {d.device_id: device_refusals(d, contents) for d in devices}
    taking = [d.device_id for d in devices if not refusals[d.device_id]]
    strata = {d.device_id: _stratum(d, stratify) for d in devices} if stratify else None
    ordered = wave_order(taking, online, strata)
    sizes = wave_sizes(waves, len(ordered))
    numbers = assign_waves(ordered, sizes)
    by_id = {d.device_id: d for d in devices}
    left_out = sorted(d for d in by_id if refusals[d])
    plans = [
        _device_plan(by_id[i], contents, build_seconds, numbers.get(i), tuple(refusals[i]))
        for i in [*ordered, *left_out]
    ]
    return Plan(tuple(plans), tuple(sizes))


def _stratum(device: Device, keys: tuple[str, ...]) -> tuple[str, ...]:
    facts = {
        "device_model": device.facts.device_model,
        "architecture": device.facts.architecture,
    }
    known = {**facts, **device.labels}
    return tuple(known.get(key, "") for key in keys)


def ship_bytes(device: Device, contents: Contents) -> int:
    """Bytes of chunks the device lacks, each counted once."""
    held = _chunks(contents, sorted(_room(device, contents).held))
    wanted = _chunks(contents, _shipped_to(device, contents))
    return sum(size for digest, size in wanted.items() if digest not in held)


def peak_disk_bytes(device: Device, contents: Contents) -> int:
    return _room(device, contents).peak_bytes


def _room(device: Device, contents: Contents) -> Room:
    shipped = _shipped_to(device, contents)
    is_built = engine_plan(device, contents).what == "built"
    building = _build_bytes(device.facts.engine_key, contents) if is_built else 0
    return Room(device, contents.release, contents.manifests, shipped, building)


def _memory_refusals(device: Device, contents: Contents) -> list[Refusal]:
    if device.report.bundle_digest == contents.release.bundle:
        return []
    facts = contents.manifests[contents.release.bundle].facts
    return memory_need_refusals(facts, sizing_of(device.facts), device.facts.memory_bytes)


def _build_bytes(key: Mapping[str, str], contents: Contents) -> int:
    """Of disk, for a build on a device that told this of its build key."""
    bundle = contents.manifests[contents.release.bundle]
    graph = sum(f.size for f in bundle.files if f.path.startswith(GRAPH_FILE))
    return build_disk_bytes(graph, _recipe(key, bundle))


def engine_plan(device: Device, contents: Contents) -> EnginePlan:
    """As the device will decide it, as far as it told its recipe."""
    if device.report.bundle_digest == contents.release.bundle:
        return EnginePlan("kept", "the device runs this bundle")
    if contents.release.bundle in device.held.built:
        return EnginePlan("kept", "the device has built it before")
    key = frozenset(device.facts.engine_key.items())
    known = contents.engine_plans.get(key)
    if known is None:
        known = contents.engine_plans[key] = _chosen_engine(device.facts.engine_key, contents)
    return known


def _chosen_engine(key: Mapping[str, str], contents: Contents) -> EnginePlan:
    chosen = choose(contents.engines, wanted_by(key, contents))
    if isinstance(chosen, Ship):
        size = _mib(contents.manifests[chosen.digest].bytes)
        return EnginePlan("shipped", f"{size}: {chosen.why}", chosen.digest)
    assert isinstance(chosen, Build)
    graph = _graph_text(key, contents.manifests[contents.release.bundle])
    return EnginePlan("built", f"{chosen.why}{graph}")


def _graph_text(key: Mapping[str, str], bundle: Manifest) -> str:
    """Which graph of a bundle with two the device builds."""
    first, *others = _built_graphs(key, bundle)
    if len(dialects_in(bundle.facts)) < 2 or first is None:
        return ""
    if others:
        return f"; from the {first} graph, or the {others[0]} one where that has no fused attention"
    return f"; from the {first} graph"


def _built_graphs(key: Mapping[str, str], bundle: Manifest) -> tuple[GraphDialect | None, ...]:
    """The bundle's dialects that a device of this key builds, in order; None for a device that does
    not tell, or takes none."""
    backend, version = key.get("backend", ""), key.get("backend_version", "")
    return to_build(dialects_in(bundle.facts), backend, version) or (None,)


def wanted_by(key: Mapping[str, str], contents: Contents) -> Wanted:
    """Of the release's bundle, by a device that told this of its recipe."""
    bundle = contents.manifests[contents.release.bundle]
    files = {f.path: f.digest for f in bundle.files}
    own = next(iter(dialects_in(bundle.facts)), None)
    recipe = _recipe(key, bundle)
    first, *others = (
        recipe if dialect in (own, None) else {**recipe, DIALECT: dialect}
        for dialect in _built_graphs(key, bundle)
    )
    return Wanted(files, first, is_whole=False, others=tuple(others))


def _recipe(key: Mapping[str, str], bundle: Manifest) -> Mapping[str, str]:
    """The device's recipe for this bundle, as far as it told it."""
    return {**key, PREFILL: prefill_of(key[PREFILL], bundle.facts)} if PREFILL in key else key


def _shipped_to(device: Device, contents: Contents) -> tuple[str, ...]:
    engine = engine_plan(device, contents).digest
    return (*contents.release.artifact_digests(), *([engine] if engine is not None else []))


def device_refusals(device: Device, contents: Contents) -> list[Refusal]:
    """All reasons at once; empty when the device can take the release."""
    found = []
    facts = device.facts
    room = _room(device, contents)
    if device.quarantine is not None:
        by = device.quarantined_by
        need = "a device that nobody cut off" if by else "one machine per identity"
        found.append(Refusal("quarantined", need, device.quarantine))
    if device.pin is not None:
        found.append(Refusal("pinned", "a device that is not pinned", device.pin))
    found += document_refusals(contents.release)
    found += constraint_refusals(
        contents.release.constraints,
        memory_bytes=facts.memory_bytes,
        disk_free_bytes=None if room.is_here else room.free_bytes,
        agent_version=facts.agent_version,
        backends=facts.backends,
        engine_key=facts.engine_key,
    )
    dialects = dialects_in(contents.manifests[contents.release.bundle].facts)
    if dialects:
        found += dialect_refusals(dialects, facts.backends)
    if facts.disk_free_bytes and room.free_bytes < room.needed_bytes:
        have = _mib(room.free_bytes)
        found.append(Refusal("disk", f"{_mib(room.needed_bytes)} free", have))
    return found + _memory_refusals(device, contents)


def release_refusals(contents: Contents) -> list[Refusal]:
    """Why the release's artifacts do not belong together, whatever the device."""
    bundle = contents.manifests[contents.release.bundle]
    found = []
    if bundle.kind != "bundle":
        found.append(Refusal("bundle", "a bundle", f"{bundle.kind} {bundle.name}"))
    found += quant_refusals(contents.release.quant, bundle.facts.get("quant"))
    capacity = bundle.facts.get("max_bank_rank")
    ranks: dict[str, int] = {}
    for adapter in contents.release.adapters:
        manifest = contents.manifests[adapter.digest]
        if manifest.kind != "adapter":
            found.append(Refusal("adapter", "an adapter", f"{manifest.kind} {manifest.name}"))
        elif manifest.base_digest != bundle.base_digest:
            need = f"adapter {adapter.name} made for base {short(bundle.base_digest)}"
            found.append(Refusal("adapter_base", need, f"base {short(manifest.base_digest)}"))
        rank = manifest.facts.get("rank")
        if isinstance(rank, int) and isinstance(capacity, int):
            ranks[adapter.name] = rank
            if rank > capacity:
                need = f"adapter {adapter.name} of rank <= {capacity}"
                found.append(Refusal("adapter_rank", need, f"rank {rank}"))
    found += _engine_refusals(contents, bundle)
    if isinstance(capacity, int):
        found += _use_case_refusals(contents.release, ranks, capacity)
    return found


def _engine_refusals(contents: Contents, bundle: Manifest) -> Iterator[Refusal]:
    """Engines that no device could ever take. Raises ArtifactInvalid."""
    graph = {f.path: f.digest for f in bundle.files}.get(GRAPH_FILE)
    for digest in contents.release.engines or ():
        manifest = contents.manifests[digest]
        if manifest.kind != "engine":
            yield Refusal("engine", "an engine", f"{manifest.kind} {manifest.name}")
        elif offered_in(digest, manifest.facts).files.get(GRAPH_FILE) != graph:
            need = f"engine {manifest.name} built from the graph of {bundle.name}"
            yield Refusal("engine_graph", need, "one of another graph")


def _use_case_refusals(
    release: Release, ranks: Mapping[str, int], capacity: int
) -> Iterator[Refusal]:
    """Use cases of several adapters that the bank could never hold together."""
    for use_case in release.use_cases:
        together = sum(ranks.get(used.name, 0) for used in use_case.adapters)
        if len(use_case.adapters) > 1 and together > capacity:
            need = f"use case {use_case.name} of ranks that add up to <= {capacity}"
            yield Refusal("use_case_rank", need, f"rank {together}")


def _device_plan(
    device: Device,
    contents: Contents,
    build_seconds: Mapping[str, float],
    wave: int | None,
    refusals: tuple[Refusal, ...],
) -> DevicePlan:
    engine = engine_plan(device, contents)
    return DevicePlan(
        device_id=device.device_id,
        hostname=device.hostname,
        wave=wave,
        ship_bytes=ship_bytes(device, contents),
        engine=engine,
        build_s=build_seconds.get(device.facts.device_model) if engine.what == "built" else 0.0,
        peak_disk_bytes=peak_disk_bytes(device, contents),
        refusals=refusals,
        peak_memory_bytes=peak_memory_bytes(
            contents.manifests[contents.release.bundle].facts,
            sizing_of(device.facts),
            device.facts.memory_bytes,
        ),
    )


def _chunks(contents: Contents, digests: Sequence[str]) -> dict[str, int]:
    """Of those artifacts that are (still) published."""
    known = (contents.manifests[d] for d in digests if d in contents.manifests)
    return {digest: size for m in known for digest, size in m.chunks().items()}


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.0f} MiB"
