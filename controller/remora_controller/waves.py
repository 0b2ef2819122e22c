"""Which device belongs to which wave. Pure."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Set

from remora_controller.domain import Wave


def wave_order(device_ids: Iterable[str], online: Set[str]) -> list[str]:
    """Online devices first, so that the first wave is one that can answer; within each part by
    the hash of the id: stable, and unrelated to how people number their devices."""
    return sorted(device_ids, key=lambda d: (d not in online, hashlib.sha256(d.encode()).digest()))


def wave_sizes(waves: tuple[Wave, ...], devices: int) -> list[int]:
    """Devices each wave adds; the rest always follows as a last wave, empty waves are dropped.

    `wave_sizes((Wave(count=1), Wave(percent=50)), 10) == [1, 4, 5]`
    """
    sizes, reached = [], 0
    for wave in waves:
        target = _target(wave, devices)
        if target > reached:
            sizes.append(target - reached)
            reached = target
    return [*sizes, devices - reached] if reached < devices else sizes


def _target(wave: Wave, devices: int) -> int:
    if wave.count is not None:
        return min(wave.count, devices)
    return min(devices, math.ceil(devices * (wave.percent or 0.0) / 100))


def assign_waves(ordered: list[str], sizes: list[int]) -> dict[str, int]:
    """Wave number, from 1, of every device."""
    numbers = [n for n, size in enumerate(sizes, start=1) for _ in range(size)]
    return dict(zip(ordered, numbers, strict=True))
