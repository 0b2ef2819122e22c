"""What of releases lies on this disk, for a controller that plans (`remora_contract.held`).

Reads the state directory; the controller is told again only when something changed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable

from remora_agent.control.activation import Record
from remora_agent.control.layout import StateLayout
from remora_agent.control.releases import read_release
from remora_agent.host import ServingHost
from remora_contract.digests import hex_of
from remora_contract.errors import InvalidInput, RemoraError
from remora_contract.held import Held, bounded
from remora_protos.control.v1 import control_pb2 as pb

log = logging.getLogger(__name__)
_ARTIFACT = re.compile("[0-9a-f]{64}")  # not what is staged, nor what somebody left there


class HeldArtifacts:
    """Used by the Sync loop's thread."""

    def __init__(
        self,
        layout: StateLayout,
        host: ServingHost,
        record: Callable[[], Record | None],
        pinned: Iterable[str],
    ) -> None:
        self._layout, self._host, self._record = layout, host, record
        self._pinned = tuple(pinned)
        self._seen: object = None  # what `_now` was read from
        self._now = Held()
        self._told = 0  # the fingerprint that the controller knows

    def put_into(self, request: pb.SyncRequest) -> None:
        """The fingerprint, and the artifacts where the controller may not know them."""
        held = self._current()
        request.held_fingerprint = held.fingerprint
        if held.fingerprint != self._told:
            request.held.CopyFrom(held_message(held))

    def answered(self, request: pb.SyncRequest, answer: pb.SyncResponse) -> None:
        if answer.wants_held:
            self._told = 0
        elif request.HasField("held"):
            self._told = request.held_fingerprint

    def _current(self) -> Held:
        """A folder that cannot be read is no reason not to Sync: then what was known stands."""
        try:
            return self._looked()
        except OSError as e:
            log.warning("held.unreadable", extra={"cause": str(e)})
            return self._now

    def _looked(self) -> Held:
        record = self._record()
        found = (p.name for p in self._layout.artifacts.iterdir())
        names = sorted(name for name in found if _ARTIFACT.fullmatch(name))
        engines = sorted(p.name for p in self._layout.engines.iterdir())
        roots = None if record is None else (record.committed, record.previous, record.phase)
        seen = (names, engines, roots)
        if seen != self._seen:
            self._now = self._read(record, names)
            self._seen = seen
        return self._now

    def _read(self, record: Record | None, names: Iterable[str]) -> Held:
        here = {f"sha256:{name}" for name in names}
        kept = here & self._rooted(record)
        bundles = {d for d in here if (self._layout.artifact(d) / "bundle.json").is_file()}
        built = [d for d in sorted(bundles) if self._is_built(d)]
        return Held(bounded(kept), bounded(here - kept), bounded(built))

    def _rooted(self, record: Record | None) -> set[str]:
        """Artifacts of the releases that no newer assignment takes off the disk."""
        named = [] if record is None else [record.committed, record.previous]
        found: set[str] = set()
        for release_id in (*named, *self._pinned):
            if release_id is not None and self._layout.release(release_id).exists():
                try:
                    found.update(read_release(self._layout, release_id).all_digests())
                except InvalidInput as e:
                    log.warning("release.unreadable", extra={"cause": str(e)})
        return found

    def _is_built(self, bundle: str) -> bool:
        try:
            return self._host.missing_engine(self._layout.artifact(bundle)) is None
        except RemoraError as e:
            log.debug("engine.not_known", extra={"bundle": bundle, "cause": str(e)})
            return False


def held_message(held: Held) -> pb.HeldArtifacts:
    return pb.HeldArtifacts(
        kept=[bytes.fromhex(hex_of(d)) for d in held.kept],
        loose=[bytes.fromhex(hex_of(d)) for d in held.loose],
        built=[bytes.fromhex(hex_of(d)) for d in held.built],
    )
