"""What is read from disk ahead of its use, and what host memory keeps for it. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping


def plan_reads(
    mixes: Iterable[Mapping[str, int]],
    resident: Collection[str],
    in_host: Collection[str],
    host_bytes: int,
) -> tuple[tuple[str, ...], frozenset[str]]:
    """What to read from disk, in order, and what host memory must not drop meanwhile.

    `mixes` are the waiting requests' adapters (digest -> bytes), first come first. Requests are
    prepared as long as all they need fits host memory together, so that two of them cannot push
    out each other's weights for ever.
    """
    keep: dict[str, int] = {}
    together = 0
    for mix in mixes:
        more = {d: size for d, size in mix.items() if d not in resident and d not in keep}
        together += sum(more.values())
        if together > host_bytes:
            break
        keep |= more
    return tuple(d for d in keep if d not in in_host), frozenset(keep)
