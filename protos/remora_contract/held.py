"""Which artifacts lie on a device's disk, as it tells the controller. Pure.

`kept` are those of releases that stay whatever is assigned next (committed, previous, pinned);
`loose` all others: they leave the disk when another release is assigned, unless it names them.
`built` are bundles whose engine is built. Each list is bounded: what is left out is shipped again
in a plan, and not in truth.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property

from remora_contract.digests import canonical_json, check_digest

MAX_HELD = 256


@dataclass(frozen=True)
class Held:
    """Each sorted, at most MAX_HELD."""

    kept: tuple[str, ...] = ()
    loose: tuple[str, ...] = ()
    built: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for digests in (self.kept, self.loose, self.built):
            if len(digests) > MAX_HELD:
                raise ValueError(f"at most {MAX_HELD} artifacts are told, not {len(digests)}")
            for digest in digests:
                check_digest(digest)

    @cached_property
    def fingerprint(self) -> int:
        """64 bits; 0 for nothing held, which is also what an agent says that tells nothing."""
        if self == Held():
            return 0
        return int.from_bytes(hashlib.sha256(canonical_json(self)).digest()[:8], "big")

    def after(self, wanted: Collection[str]) -> frozenset[str]:
        """Still here once a release of these artifacts is assigned."""
        return frozenset(self.kept) | (frozenset(self.loose) & frozenset(wanted))

    def freed(self, wanted: Collection[str]) -> frozenset[str]:
        """What leaves the disk then."""
        return frozenset(self.loose) - frozenset(wanted) - frozenset(self.kept)


def bounded(digests: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(digests)[:MAX_HELD])
