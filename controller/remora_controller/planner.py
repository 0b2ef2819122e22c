"""What a release would cost each device, and why some cannot take it. Pure.

`remora plan` shows exactly what `rollout start` checks. A device already holds the chunks of the
bundle and the adapters it reports, so a new adapter ships as its own few chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from remora_contract.artifact import Manifest
from remora_contract.compat import constraint_refusals
from remora_contract.dialects import dialect_refusals
from remora_contract.digests import short
from remora_contract.errors import Refusal
from remora_contract.release import Release
from remora_controller.domain import Device, Wave
from remora_controller.waves import assign_waves, wave_order, wave_sizes


@dataclass(frozen=True)
class Contents:
    """A release with the manifests of its artifacts, and of what devices may hold already."""

    release: Release
    manifests: Mapping[str, Manifest]  # at least the release's own, by digest


@dataclass(frozen=True)
class DevicePlan:
    device_id: str
    hostname: str
    wave: int | None  # None when refused
    ship_bytes: int
    builds_engine: bool
    build_s: float | None  # None: no device like it has built one yet
    peak_disk_bytes: int
    refusals: tuple[Refusal, ...]


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
    held = _chunks(contents, (device.report.bundle_digest, *_adapters_of(device)))
    wanted = _chunks(contents, contents.release.artifact_digests())
    return sum(size for digest, size in wanted.items() if digest not in held)


def peak_disk_bytes(device: Device, contents: Contents) -> int:
    """Chunks while staging, the new artifacts put together from them, and an engine about as
    large as its bundle when one has to be built."""
    has = {device.report.bundle_digest, *_adapters_of(device)}
    new = [contents.manifests[d] for d in set(contents.release.artifact_digests()) - has]
    engine = contents.manifests[contents.release.bundle].bytes
    built = engine if builds_engine(device, contents) else 0
    return ship_bytes(device, contents) + sum(m.bytes for m in new) + built


def builds_engine(device: Device, contents: Contents) -> bool:
    return device.report.bundle_digest != contents.release.bundle


def device_refusals(device: Device, contents: Contents) -> list[Refusal]:
    """All reasons at once; empty when the device can take the release."""
    found = []
    facts = device.facts
    if device.quarantine is not None:
        found.append(Refusal("quarantined", "one machine per identity", device.quarantine))
    found += constraint_refusals(
        contents.release.constraints,
        memory_bytes=facts.memory_bytes,
        agent_version=facts.agent_version,
        backends=facts.backends,
    )
    dialect = contents.manifests[contents.release.bundle].facts.get("dialect")
    if dialect == "native" or dialect == "legacy":
        found += dialect_refusals(dialect, facts.backends)
    peak = peak_disk_bytes(device, contents)
    if facts.disk_free_bytes and facts.disk_free_bytes < peak:
        found.append(Refusal("disk", f"{_mib(peak)} free", _mib(facts.disk_free_bytes)))
    return found


def release_refusals(contents: Contents) -> list[Refusal]:
    """Why the release's artifacts do not belong together, whatever the device."""
    bundle = contents.manifests[contents.release.bundle]
    found = []
    if bundle.kind != "bundle":
        found.append(Refusal("bundle", "a bundle", f"{bundle.kind} {bundle.name}"))
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
    if isinstance(capacity, int):
        found += _use_case_refusals(contents.release, ranks, capacity)
    return found


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
    builds = builds_engine(device, contents)
    return DevicePlan(
        device_id=device.device_id,
        hostname=device.hostname,
        wave=wave,
        ship_bytes=ship_bytes(device, contents),
        builds_engine=builds,
        build_s=build_seconds.get(device.facts.device_model) if builds else 0.0,
        peak_disk_bytes=peak_disk_bytes(device, contents),
        refusals=refusals,
    )


def _adapters_of(device: Device) -> tuple[str, ...]:
    return tuple(a.digest for a in device.report.adapters)


def _chunks(contents: Contents, digests: Sequence[str]) -> dict[str, int]:
    """Of those artifacts that are (still) published."""
    known = (contents.manifests[d] for d in digests if d in contents.manifests)
    return {digest: size for m in known for digest, size in m.chunks().items()}


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.0f} MiB"
