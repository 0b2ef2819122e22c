"""The effects of the state machine: each one does its work and says with which event it ended.

Knows the stager, the serving host and the disk; decides nothing about what comes next.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from remora_agent.control.activation import Effect, Record
from remora_agent.control.facts import machine_facts
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
from remora_agent.control.staging import Stager
from remora_agent.host import Assignment, Progress, ServingHost
from remora_contract.compat import constraint_refusals
from remora_contract.errors import Incompatible, NotFound

log = logging.getLogger(__name__)
# (event name, detail) into the spool
Emit = Callable[[str, Mapping[str, object]], None]


@dataclass(frozen=True)
class Effects:
    layout: StateLayout
    host: ServingHost
    stager: Stager
    emit: Emit

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
        facts = machine_facts(self.layout.root)
        refusals = constraint_refusals(
            release.constraints,
            memory_bytes=facts.memory_bytes,
            agent_version=facts.agent_version,
            backends=facts.backends,
        )
        if refusals:
            raise Incompatible(refusals)
        store_release(self.layout, release)
        if record.committed == release.release_id and self._serves(release.release_id):
            return Event.ALREADY_SERVING
        return Event.ADMITTED

    def _stage(self, record: Record, progress: Progress) -> Event:
        release = parse_release(record.desired)
        self.stager.cap(record.desired.download_bytes_per_s)
        for fetched in self.stager.stage(wanted_artifacts(release), progress):
            self.emit(
                "artifact.fetched",
                {
                    "digest": fetched.digest,
                    "kind": fetched.kind,
                    "bytes": fetched.received_bytes,
                    "seconds": round(fetched.seconds, 3),
                },
            )
        check_fits_together(self.layout, release)
        return Event.DONE

    def _build(self, record: Record, progress: Progress) -> Event:
        outcome = self.host.build(self._assignment(record), progress)
        self.emit(
            "engine.built",
            {
                "engine": outcome.engine_digest,
                "from_cache": outcome.from_cache,
                "seconds": round(outcome.seconds, 3),
            },
        )
        return Event.DONE

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
