"""The controller's words as frozen values: devices, assignments, releases, rollouts.

Owns no behaviour beyond small derivations. Knows neither the wire nor the database.
Times are Unix seconds, sizes bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from remora_contract.device_phase import MAX_SOAK_S, Phase
from remora_contract.gates import Gate, GateSet
from remora_contract.held import Held
from remora_contract.windows import parse_windows

MAX_WAVE_TIMEOUT_S = 30 * 86_400.0
MAX_STRATA = 4  # label keys
LEAST_DOWNLOAD_BYTES_PER_S = 1024


@dataclass(frozen=True)
class Facts:
    """What a device is. 0 and "" mean that it did not say."""

    machine_id: str = ""
    hostname: str = ""
    agent_version: str = ""
    architecture: str = ""
    device_model: str = ""
    memory_bytes: int = 0
    disk_free_bytes: int = 0
    backends: dict[str, str] = field(default_factory=dict)
    cores: int = 0
    engine_key: dict[str, str] = field(default_factory=dict)  # see remora_contract.engine
    engine_rows: int = 0
    engine_context: int = 0  # 0 where it said the rows: what a bundle was exported for
    memory_floor_bytes: int = 0
    disk_floor_bytes: int = 0
    gpu_memory_bytes: int = 0  # of the GPU whose engines it opens
    gpu_shares_memory: bool = False  # with the system


@dataclass(frozen=True)
class ServingAdapter:
    name: str
    revision: str
    digest: str
    epoch: int = 0


@dataclass(frozen=True)
class Report:
    """What a device last said about itself; `generation` is the assignment `phase` speaks of."""

    phase: str = ""
    generation: int = 0
    release_id: str = ""
    running_release_id: str = ""
    bundle_digest: str = ""
    adapters: tuple[ServingAdapter, ...] = ()
    error_code: str = ""
    error_message: str = ""
    progress: float = 0.0
    hold: str = ""  # why it does not switch now
    hold_until: float = 0.0  # on the device's clock


@dataclass(frozen=True)
class BootTrail:
    """Which agent process spoke last, and which spoke before it. See `clones`."""

    boot_id: str = ""
    seq: int = 0
    earlier: tuple[str, ...] = ()


@dataclass(frozen=True)
class Device:
    device_id: str
    enrolled_at: float
    key_fingerprint: str
    facts: Facts = field(default_factory=Facts)
    device_labels: dict[str, str] = field(default_factory=dict)  # from the agent's configuration
    operator_labels: dict[str, str] = field(default_factory=dict)  # win over the device's own
    report: Report = field(default_factory=Report)
    held: Held = field(default_factory=Held)  # artifacts on its disk
    trail: BootTrail = field(default_factory=BootTrail)
    last_seen: float | None = None
    events_up_to: int = 0
    quarantine: str | None = None  # the reason
    quarantined_by: str = ""  # the operator; "": the controller itself, or nobody
    pin: str | None = None  # why rollouts leave it as it is, and who said so
    removed_at: float | None = None

    @property
    def labels(self) -> dict[str, str]:
        return {**self.device_labels, **self.operator_labels}

    @property
    def hostname(self) -> str:
        return self.facts.hostname


@dataclass(frozen=True)
class Assignment:
    """What a device should run. `release_id` None: nothing; it keeps what it runs."""

    device_id: str
    generation: int
    release_id: str | None
    rollout_id: str | None
    soak_s: float
    is_rollback: bool
    created_at: float
    phase: Phase | None = None  # the furthest the device reported for this generation
    error: str = ""  # what it reported with that phase
    served_at: float | None = None  # when it was first heard to serve the release
    download_bytes_per_s: int | None = None


@dataclass(frozen=True)
class ReleaseRecord:
    release_id: str
    name: str
    document: bytes  # canonical JSON of remora_contract.release.Release
    created_at: float
    created_by: str


@dataclass(frozen=True)
class Wave:
    """Brings the rollout to `count` devices, or to `percent` of them; cumulative."""

    count: int | None = None
    percent: float | None = None

    def __post_init__(self) -> None:
        if (self.count is None) == (self.percent is None):
            raise ValueError("a wave has either a count or a percentage")
        if self.count is not None and self.count < 1:
            raise ValueError("a wave brings at least one device")
        if self.percent is not None and not 0 < self.percent <= 100:
            raise ValueError(f"a wave's percentage is above 0 and at most 100, not {self.percent}")


@dataclass(frozen=True)
class RolloutSpec:
    waves: tuple[Wave, ...] = (Wave(count=1),)  # the rest always follows as a last wave
    soak_s: float = 60.0
    success_threshold: float = 1.0
    wave_timeout_s: float = 3600.0
    max_unavailable: int | None = None  # None: a whole wave at once
    gates: tuple[Gate, ...] = ()  # the release's and the rollout's own together
    stratify: tuple[str, ...] = ()  # label keys
    not_before: float | None = None  # no device is touched earlier
    windows: tuple[str, ...] = ()  # of devices without a window label; `remora_contract.windows`
    download_bytes_per_s: int | None = None  # of each device
    total_bytes_per_s: int | None = None  # of all that fetch at once, together

    def __post_init__(self) -> None:
        if not 0 < self.success_threshold <= 1:
            raise ValueError("the success threshold is above 0 and at most 1")
        if not 0 <= self.soak_s <= MAX_SOAK_S:
            raise ValueError(f"a soak takes 0 to {MAX_SOAK_S:.0f} seconds, not {self.soak_s}")
        if not self.soak_s < self.wave_timeout_s <= MAX_WAVE_TIMEOUT_S:
            raise ValueError(
                f"a wave timeout is longer than the soak of {self.soak_s:.0f} s and at most "
                f"{MAX_WAVE_TIMEOUT_S:.0f} s, not {self.wave_timeout_s}"
            )
        if self.max_unavailable is not None and self.max_unavailable < 1:
            raise ValueError("at least one device must be allowed to change at a time")
        GateSet(checks=self.gates)
        _check_schedule(self)


def _check_schedule(spec: RolloutSpec) -> None:
    if len(spec.stratify) > MAX_STRATA:
        raise ValueError(f"waves are spread over at most {MAX_STRATA} label keys")
    if spec.not_before is not None and not 0 < spec.not_before < 1e11:
        raise ValueError("not before: a time in Unix seconds")
    parse_windows(spec.windows)
    device, together = spec.download_bytes_per_s, spec.total_bytes_per_s
    for what, rate in (("a device downloads", device), ("a rollout downloads", together)):
        if rate is not None and not LEAST_DOWNLOAD_BYTES_PER_S <= rate < 1 << 40:
            raise ValueError(f"{what} at least {LEAST_DOWNLOAD_BYTES_PER_S} bytes/s")


class RolloutState(Enum):
    AWAITING_APPROVAL = "AWAITING_APPROVAL"
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    ABORTING = "ABORTING"
    ROLLING_BACK = "ROLLING_BACK"
    COMPLETED = "COMPLETED"
    ABORTED = "ABORTED"
    ROLLED_BACK = "ROLLED_BACK"
    SUPERSEDED = "SUPERSEDED"

    @property
    def is_final(self) -> bool:
        return self in FINAL_STATES


FINAL_STATES = frozenset(
    {
        RolloutState.COMPLETED,
        RolloutState.ABORTED,
        RolloutState.ROLLED_BACK,
        RolloutState.SUPERSEDED,
    }
)


@dataclass(frozen=True)
class RolloutRecord:
    rollout_id: str
    release_id: str
    selector: str
    spec: RolloutSpec
    waves: int
    created_at: float
    created_by: str
    state: RolloutState = RolloutState.RUNNING
    reason: str = ""
    wave: int = 1
    clock_at: float = 0.0  # when this wave (or going back) began, or was resumed
    keep: bool = False  # an abort that leaves devices as they are
    accepted_wave: int = 0  # up to it an operator goes on whatever gates say
    retry_of: str | None = None  # the rollout that this one tries again
    attempt: int = 1
    finished_at: float | None = None
    version: int = 0  # grows with every change: the compare in compare-and-swap
    needs_approval: bool = False  # by somebody else than created_by, before it begins
    approved_by: str = ""


@dataclass(frozen=True)
class Member:
    """A device's place in a rollout."""

    device_id: str
    wave: int
    generation: int | None = None  # given by this rollout
    rollback_generation: int | None = None  # given when it went back
    bucket: int = 0  # of its id, as it was when the rollout began: the order within a stratum


@dataclass(frozen=True)
class StoredEvent:
    at: float
    device_id: str  # "" for the controller's own
    name: str
    detail_json: str


@dataclass(frozen=True)
class MetricPoint:
    device_id: str
    name: str
    value: float
    at: float


@dataclass(frozen=True)
class DeviceEvent:
    seq: int
    at: float
    name: str
    detail_json: str


@dataclass(frozen=True)
class SyncRecord:
    """What one Sync leaves behind; many are stored in one transaction."""

    device_id: str
    facts: Facts
    device_labels: Mapping[str, str]
    report: Report
    trail: BootTrail
    seen_at: float
    events: tuple[DeviceEvent, ...] = ()
    held: Held | None = None  # None: as it is stored


@dataclass(frozen=True)
class Sighting:
    """A heartbeat without news, kept in memory and flushed in batches."""

    device_id: str
    trail: BootTrail
    seen_at: float
