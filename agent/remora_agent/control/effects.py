"""The effects of the state machine: each one does its work and says with which event it ended.

Knows the stager, the serving host and the disk; decides nothing about what comes next.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from remora_agent.control.activation import Effect, Record
from remora_agent.control.facts import machine_facts
from remora_agent.control.garbage import collect
from remora_agent.control.layout import StateLayout
from remora_agent.control.phase import Event
from remora_agent.control.releases import (
    check_fits_together,
    make_assignment,
    parse_release,
    read_release,
    store_release,
    wanted_artifacts,
)
from remora_agent.control.sharing.obtain import NoSharing, Origins
from remora_agent.control.staging import Fetched, Stager, Wanted
from remora_agent.host import Assignment, BuildOutcome, Progress, ServingHost
from remora_contract.compat import constraint_refusals
from remora_contract.engine import Build, Ship, choose, offered_in
from remora_contract.errors import (
    ArtifactInvalid,
    DocumentInvalid,
    Exhausted,
    Incompatible,
    NotFound,
    Refusal,
    Unsupported,
)
from remora_contract.memory_need import Sizing, memory_need_refusals
from remora_contract.release import Release
from remora_contract.release_rules import document_refusals

log = logging.getLogger(__name__)
# Staging cannot go on without it either.
NO_MANIFEST = (ArtifactInvalid, DocumentInvalid, NotFound, Unsupported)
# Of an engine: the device builds one instead.
NOT_SHIPPED = (ArtifactInvalid, DocumentInvalid, NotFound, Unsupported, Exhausted)
# (event name, detail) into the spool
Emit = Callable[[str, Mapping[str, object]], None]


@dataclass(frozen=True)
class Effects:
    layout: StateLayout
    host: ServingHost
    stager: Stager
    emit: Emit
    origins: Origins = field(default_factory=NoSharing)
    sizing: Sizing | None = None  # how engines are opened; None: nothing is said about memory
    pinned: tuple[str, ...] = ()  # releases that stay on the disk

    def perform(self, effect: Effect, record: Record, progress: Progress) -> Event:
        """Raises whatever the work raises; the caller turns that into FAILED or REFUSED."""
        work = {
            Effect.ADMIT: self._admit,
            Effect.STAGE: self._stage,
            Effect.BUILD: self._build,
            Effect.PROVE: self._prove,
            Effect.SWITCH: self._switch,
            Effect.REVERT: self._revert,
        }
        desired = record.desired
        self.stager.cap(desired.download_bytes_per_s, desired.shares_bandwidth)
        return work[effect](record, progress)

    def serve(self, release_id: str, progress: Progress) -> None:
        """Makes a release that is on this disk the one that serves; nothing when it does."""
        if self._serves(release_id):
            return
        assignment = make_assignment(self.layout, read_release(self.layout, release_id))
        self.host.build(assignment, progress)
        self.host.switch(assignment)

    def _admit(self, record: Record, progress: Progress) -> Event:
        release = parse_release(record.desired)
        store_release(self.layout, release)  # before room is made: what it names must stay
        refusals = self._refusals(release, record)
        if any(r.code == "disk" for r in refusals) and self._make_room(record):
            refusals = self._refusals(release, record)
        if refusals:
            raise Incompatible(refusals)
        if record.committed == release.release_id and self._serves(release.release_id):
            return Event.ALREADY_SERVING
        return Event.ADMITTED

    def _refusals(self, release: Release, record: Record) -> list[Refusal]:
        facts = machine_facts(self.layout.root)
        # A way back needs no room: what it leads to is still here.
        is_here = all(self.layout.artifact(d).exists() for d in release.artifact_digests())
        found = document_refusals(release) + constraint_refusals(
            release.constraints,
            memory_bytes=facts.memory_bytes,
            disk_free_bytes=None if is_here else facts.disk_free_bytes,
            agent_version=facts.agent_version,
            backends=facts.backends,
            engine_key=self.host.engine_key(),
        )
        return found or self._memory_refusals(release, record, facts.memory_bytes)

    def _memory_refusals(
        self, release: Release, record: Record, memory_bytes: int
    ) -> list[Refusal]:
        """Of a bundle that does not serve here and is not gone back to: those fit."""
        serving = self.host.serving()
        is_served = serving is not None and serving.bundle_digest == release.bundle
        if self.sizing is None or record.desired.is_rollback or is_served:
            return []
        try:
            manifest = self.stager.manifest(release.bundle)
        except NO_MANIFEST as e:
            log.info("memory.not_known", extra={"cause": str(e)})  # staging fails by it, and tells
            return []
        sizing = replace(self.sizing, gpu=self.host.gpu_memory())
        return memory_need_refusals(manifest.facts, sizing, memory_bytes)

    def _make_room(self, record: Record) -> int:
        return collect(self.layout, record, self.pinned)

    def _stage(self, record: Record, progress: Progress) -> Event:
        release = parse_release(record.desired)
        self.stager.make_room = lambda: self._make_room(record)
        for fetched in self.stager.stage(wanted_artifacts(release), progress):
            self._emit_fetched(fetched)
        check_fits_together(self.layout, release)
        self._stage_engine(release, progress)
        return Event.DONE

    def _stage_engine(self, release: Release, progress: Progress) -> None:
        """The one engine of the release that fits, if any. Nothing about engines of others fails a
        release: the device can build."""
        if not release.engines:
            return
        wanted = self.host.engine_wanted(self.layout.artifact(release.bundle))
        if wanted is None:
            self.emit("engine.chosen", {"engine": "cached", "why": "it was built before"})
            return
        try:
            manifests = [self.stager.manifest(d) for d in release.engines]
            chosen = choose([offered_in(m.digest, m.facts) for m in manifests], wanted)
            if isinstance(chosen, Ship):
                for fetched in self.stager.stage([Wanted("engine", chosen.digest)], progress):
                    self._emit_fetched(fetched)
        except NOT_SHIPPED as e:
            chosen = Build(f"the engine could not be fetched: {e}")
        what = "shipped" if isinstance(chosen, Ship) else "built"
        self.emit("engine.chosen", {"engine": what, "why": chosen.why})

    def _emit_fetched(self, fetched: Fetched) -> None:
        self.emit(
            "artifact.fetched",
            {
                "digest": fetched.digest,
                "kind": fetched.kind,
                "bytes": fetched.received_bytes,
                "seconds": round(fetched.seconds, 3),
            },
        )

    def _build(self, record: Record, progress: Progress) -> Event:
        assignment = self._assignment(record)
        origin = self.origins.obtain(record, assignment, progress)
        outcome = self._built(assignment, record, progress)
        is_shared = origin.what == "shared" and outcome.from_cache
        graph = {} if outcome.dialect is None else {"dialect": outcome.dialect}
        self.emit(
            "engine.built",
            {
                "engine": outcome.engine_digest,
                # Of no use to a fleet that asks how long builds take.
                "from_cache": outcome.source != "built",
                "source": "shared" if is_shared else outcome.source,
                "shares": origin.leased,
                "why": outcome.why or origin.why,
                "seconds": round(outcome.seconds, 3),
                **graph,
            },
        )
        return Event.DONE

    def _built(self, assignment: Assignment, record: Record, progress: Progress) -> BuildOutcome:
        try:
            return self.host.build(assignment, progress)
        except Exhausted as e:
            if not self._make_room(record):
                raise
            log.info("engine.build_again", extra={"cause": str(e)})
        return self.host.build(assignment, progress)

    def _prove(self, record: Record, progress: Progress) -> Event:
        self.host.prove(self._assignment(record), progress)
        return Event.DONE

    def _switch(self, record: Record, progress: Progress) -> Event:
        self.host.switch(self._assignment(record))
        return Event.DONE

    def _revert(self, record: Record, progress: Progress) -> Event:
        if record.committed is None:
            raise NotFound("there is no earlier release on this device to go back to")
        self.serve(record.committed, progress)
        return Event.DONE

    def _serves(self, release_id: str) -> bool:
        serving = self.host.serving()
        return serving is not None and serving.release_id == release_id

    def _assignment(self, record: Record) -> Assignment:
        return make_assignment(self.layout, parse_release(record.desired))
