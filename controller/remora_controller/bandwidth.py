"""A rollout's total bandwidth, divided among the devices that fetch at this moment.

What is granted never exceeds the total: a device that begins gets what is free, and its fair part
once the others have heard, with their next Sync, that theirs is smaller. Time comes in; knows no
store. In memory only: a controller that has just started grants nothing beyond what devices hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# A device that says nothing for so long, or for two Syncs where these are rarer, stops fetching by
# itself, and its share is given on.
SHARE_FOR_S = 30.0
_CALL_S = 5.0  # on its way to the device, a grant ages


def share_for_s(interval_s: float) -> float:
    """How long a grant holds, between Syncs of so many seconds."""
    return max(SHARE_FOR_S, 2 * interval_s)


@dataclass(frozen=True)
class _Grant:
    limit: int | None  # what the device itself takes at most
    bytes_per_s: int
    until: float


def max_min_shares(total: int, limits: Mapping[str, int | None]) -> dict[str, int]:
    """Equal parts of `total`; what a device's own limit leaves of its part goes to the others."""
    shares, left = {}, total
    by_limit = sorted(limits.items(), key=lambda item: (item[1] is None, item[1], item[0]))
    for place, (device_id, limit) in enumerate(by_limit):
        part = left // (len(by_limit) - place)
        shares[device_id] = part if limit is None else min(part, limit)
        left -= shares[device_id]
    return shares


class BandwidthBook:
    """Who was granted what, by rollout. Used by one thread."""

    def __init__(self, started_at: float) -> None:
        self._started_at = started_at
        self._grants: dict[str, dict[str, _Grant]] = {}

    def share(
        self,
        rollout_id: str,
        total: int,
        device_id: str,
        limit: int | None,
        held: int,
        now: float,
        for_s: float = SHARE_FOR_S,
    ) -> int:
        """Bytes a second for a device that fetches, for `for_s`; 0: it has to wait. `held` is what
        it says that it was granted before."""
        grants = self._living(rollout_id, now)
        others = {d: g for d, g in grants.items() if d != device_id}
        free = max(0, total - sum(g.bytes_per_s for g in others.values()))
        limits = {d: g.limit for d, g in others.items()} | {device_id: limit}
        wanted = max_min_shares(total, limits)[device_id]
        if now < self._started_at + for_s + _CALL_S:  # not all that fetch have told what they hold
            wanted = min(wanted, held)
        granted = min(wanted, free)
        grants[device_id] = _Grant(limit, granted, now + for_s + _CALL_S)
        return granted

    def end(self, rollout_id: str, device_id: str) -> None:
        """It does not fetch any more."""
        self._grants.get(rollout_id, {}).pop(device_id, None)

    def _living(self, rollout_id: str, now: float) -> dict[str, _Grant]:
        for known, grants in list(self._grants.items()):
            self._grants[known] = {d: g for d, g in grants.items() if now < g.until}
            if not self._grants[known]:
                del self._grants[known]
        return self._grants.setdefault(rollout_id, {})
