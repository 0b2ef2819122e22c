"""The interface every store has; tests/controller/store_contract.py is its meaning.

Every method is one transaction: it happened wholly or not at all. Those that write raise Exhausted
when there is no room. Methods block and are called by
one thread at a time. Knows nothing of SQL, of gRPC, or of why something is written.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from remora_controller.domain import (
    Assignment,
    Device,
    Member,
    MetricPoint,
    ReleaseRecord,
    RolloutRecord,
    RolloutState,
    Sighting,
    StoredEvent,
    SyncRecord,
)
from remora_controller.gates.evaluate import Series
from remora_controller.late_gates import LateState
from remora_controller.rollout import Action, Attempt
from remora_controller.store.experiments import ExperimentStore
from remora_controller.store.governance import GovernanceStore
from remora_controller.store.late import LateStore
from remora_controller.store.sharing import SharingStore


@dataclass(frozen=True)
class JoinTokenRecord:
    """A one-time token; only the hash of its secret is ever stored."""

    secret_sha256: str
    labels: dict[str, str]
    created_at: float
    expires_at: float
    created_by: str


@dataclass(frozen=True)
class MemberState:
    """A rollout's member with what its decision needs; `last_good` precedes the rollout. `error` is
    of its last attempt that had one: it outlives the way back."""

    member: Member
    hostname: str
    labels: dict[str, str]
    is_barred: bool  # removed, quarantined or pinned
    last_seen: float | None
    forward: Attempt | None
    back: Attempt | None
    last_good: str | None
    progress: float
    error: str
    hold: str = ""  # why the device says it does not switch now
    late: LateState | None = None  # None: it went with its wave
    late_detail: str = ""


class DeviceStore(Protocol):
    def add_join_token(self, token: JoinTokenRecord) -> None: ...

    def enrol(self, secret_sha256: str, device: Device, now: float) -> Device:
        """Uses the token up and stores the device, which gets the token's labels.

        The same key may ask again with its token and gets the same device: an answer can be lost.
        Raises Unauthenticated when the token is unknown, expired or used by another key."""
        ...

    def device(self, device_id: str) -> Device | None:
        """Also removed ones: the caller must look."""
        ...

    def devices(self) -> list[Device]:
        """All but the removed, by id."""
        ...

    def standings(self) -> list[tuple[str, str | None]]:
        """Of the same: id, and \"quarantined\" or None. Cheap: asked every few seconds."""
        ...

    def set_operator_labels(self, device_id: str, labels: dict[str, str]) -> None: ...

    def quarantine(self, device_id: str, reason: str, at: float) -> None: ...

    def remove_device(self, device_id: str, at: float) -> None:
        """For good: the id joins the deny list."""
        ...

    def record_syncs(self, records: Sequence[SyncRecord]) -> None:
        """Newest report by order of the sequence; each generation's phase only moves forward;
        events already stored are left out."""
        ...

    def record_sightings(self, sightings: Sequence[Sighting]) -> None: ...


class RolloutStore(Protocol):
    def assignment(self, device_id: str) -> Assignment | None:
        """The newest one: what the device should run."""
        ...

    def assignments(self) -> dict[str, Assignment]:
        """The newest of every device."""
        ...

    def assign_late(self, device_id: str, rollout: RolloutRecord, now: float) -> Assignment:
        """Brings one device straight to a completed rollout's release and makes it a member."""
        ...

    def add_release(self, release: ReleaseRecord) -> ReleaseRecord:
        """The stored one when it exists already: a release is its content."""
        ...

    def release(self, name_or_id: str) -> ReleaseRecord | None:
        """By id, else the newest of that name."""
        ...

    def releases(self) -> list[ReleaseRecord]:
        """Newest first."""
        ...

    def add_rollout(
        self, rollout: RolloutRecord, members: Sequence[Member], *, supersede: bool
    ) -> list[str]:
        """Ids of the superseded rollouts. Raises Conflict when a member is in an open rollout
        and `supersede` is not set."""
        ...

    def rollout(self, rollout_id: str) -> RolloutRecord | None: ...

    def rollouts(self, limit: int = 100) -> list[RolloutRecord]:
        """Newest first."""
        ...

    def open_rollouts(self) -> list[RolloutRecord]:
        """Those not in a final state, oldest first."""
        ...

    def completed_rollouts(self) -> list[RolloutRecord]:
        """Newest completion first."""
        ...

    def member_states(self, rollout_id: str) -> list[MemberState]:
        """In order of wave, then as they were given."""
        ...

    def apply(
        self, rollout: RolloutRecord, actions: Sequence[Action], now: float
    ) -> list[Assignment] | None:
        """Carries a decision out if the rollout is still at `rollout.version`, else None."""
        ...

    def set_state(
        self,
        rollout: RolloutRecord,
        state: RolloutState,
        reason: str,
        keep: bool,
        now: float,
        accepted_wave: int | None = None,
    ) -> bool:
        """An operator's change, under the same comparison. `accepted_wave` None: as it was."""
        ...

    def keep_baselines(self, rollout_id: str, series: Mapping[str, Series]) -> None:
        """What devices measured on their incumbents, by device; in place of what
        was kept of them."""
        ...

    def baselines(self, rollout_id: str, device_id: str | None = None) -> dict[str, Series]:
        """Of all its devices, or of one."""
        ...


class JournalStore(Protocol):
    def add_events(self, events: Sequence[StoredEvent]) -> None: ...

    def events(
        self, device_id: str | None, limit: int, name: str | None = None
    ) -> list[StoredEvent]:
        """Newest first."""
        ...

    def add_metrics(self, points: Sequence[MetricPoint]) -> None: ...

    def latest_metrics(self) -> dict[str, dict[str, MetricPoint]]:
        """By device, then by name."""
        ...

    def metric_history(self, device_id: str, name: str) -> list[MetricPoint]:
        """Oldest first; short and bounded."""
        ...

    def metric_samples(
        self, names: Collection[str], since: float, device_ids: Collection[str] | None = None
    ) -> list[MetricPoint]:
        """Of all devices or some, these metrics with or without labels: by device, as they came."""
        ...

    def prune(self, now: float) -> None:
        """Drops what exceeds the bounds: old metrics and events, spent tokens, old assignments."""
        ...


class Store(
    DeviceStore,
    RolloutStore,
    LateStore,
    JournalStore,
    GovernanceStore,
    SharingStore,
    ExperimentStore,
    Protocol,
):
    def close(self) -> None: ...
