"""Has a device room for a release: what lies on its disk already, what it can drop, what it needs.
Pure, and as the device will reckon it.

A device that is short of disk drops what neither the new release nor one that stays needs, and
only then: what lies there may hold chunks of what comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from remora_contract.artifact import Manifest
from remora_contract.engine import PREFILL
from remora_contract.memory_need import MAX_ROWS, Sizing
from remora_contract.release import Release
from remora_contract.trt_memory import GpuMemory
from remora_controller.domain import Device, Facts


@dataclass(frozen=True)
class Room:
    """`shipped`: what of the release the device should have; `building`: bytes that a build may
    write beside it."""

    device: Device
    release: Release
    manifests: Mapping[str, Manifest]
    shipped: tuple[str, ...]
    building: int

    @cached_property
    def new(self) -> list[Manifest]:
        """What is not on its disk."""
        return [self.manifests[d] for d in sorted(set(self.shipped) - _here(self.device))]

    @property
    def is_here(self) -> bool:
        return _here(self.device).issuperset(self.release.artifact_digests())

    @property
    def peak_bytes(self) -> int:
        """The new artifacts with, while they are put together, the largest file of several chunks
        twice; or with what a build may write beside them."""
        return sum(m.bytes for m in self.new) + max(self.building, self._assembling)

    @property
    def _assembling(self) -> int:
        return max((f.size for m in self.new for f in m.files if len(f.chunks) > 1), default=0)

    @property
    def needed_bytes(self) -> int:
        """Of free disk: while it stages its floor stays free too, a build may use that."""
        new = sum(m.bytes for m in self.new)
        floor = self.device.facts.disk_floor_bytes if self.new else 0
        return max(new + self._assembling + floor, new + self.building)

    @cached_property
    def is_short(self) -> bool:
        free = self.device.facts.disk_free_bytes
        asked = None if self.is_here else self.release.constraints.min_disk_free_bytes
        return bool(free) and free < max(self.needed_bytes, asked or 0)

    @property
    def free_bytes(self) -> int:
        """With what it can drop; 0: it did not say."""
        free = self.device.facts.disk_free_bytes
        if not self.is_short:
            return free
        dropped = self.device.held.freed(self.release.all_digests()) - _serving(self.device)
        return free + sum(self.manifests[d].bytes for d in dropped if d in self.manifests)

    @property
    def held(self) -> frozenset[str]:
        """Artifacts whose chunks it need not fetch."""
        if self.is_short:
            staying = self.device.held.after(self.release.all_digests())
            return staying | _serving(self.device)
        return _here(self.device)


def _here(device: Device) -> frozenset[str]:
    return _serving(device) | frozenset((*device.held.kept, *device.held.loose))


def _serving(device: Device) -> frozenset[str]:
    return frozenset((device.report.bundle_digest, *(a.digest for a in device.report.adapters)))


def sizing_of(facts: Facts) -> Sizing | None:
    """How its agent opens engines; None: it does not say, or what no agent would: a peak of any
    rows is more than an answer to the operator can hold."""
    if not 1 <= facts.engine_rows <= MAX_ROWS:
        return None
    return Sizing(
        backend=facts.engine_key.get("backend", ""),
        rows=facts.engine_rows,
        context=facts.engine_context or None,
        floor_bytes=facts.memory_floor_bytes,
        prefill=facts.engine_key.get(PREFILL, "plain"),
        gpu=_gpu_of(facts),
    )


def _gpu_of(facts: Facts) -> GpuMemory | None:
    if not facts.gpu_memory_bytes:
        return None
    return GpuMemory(facts.gpu_memory_bytes, facts.gpu_shares_memory)
