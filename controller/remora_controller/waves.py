"""Which device belongs to which wave. Pure."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence, Set

from remora_controller.domain import Wave


def bucket(device_id: str) -> int:
    """Of 2**32: stable, and unrelated to how people number their devices."""
    return int.from_bytes(hashlib.sha256(device_id.encode()).digest()[:4], "big")


def wave_order(
    device_ids: Iterable[str], online: Set[str], strata: Mapping[str, Sequence[str]] | None = None
) -> list[str]:
    """Online devices first, so that the first wave is one that can answer; within each part by
    `bucket`, and by the id where two are alike.

    `strata` names each device's failure domain: then every beginning of the order holds of each
    domain its share of the fleet. The k-th (from 0) of a domain's n devices stands at (k + 1/2)/n.
    """
    ordered = sorted(device_ids, key=lambda d: (d not in online, bucket(d), d))
    if strata is None:
        return ordered
    domains: dict[tuple[str, ...], list[str]] = {}
    for device_id in ordered:
        domains.setdefault(tuple(strata.get(device_id, ())), []).append(device_id)
    places = {
        device_id: (k + 0.5) / len(members)
        for members in domains.values()
        for k, device_id in enumerate(members)
    }
    rank = {device_id: n for n, device_id in enumerate(ordered)}
    return sorted(ordered, key=lambda d: (places[d], rank[d]))


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
