from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AskDeviceRequest(_message.Message):
    __slots__ = ("device_id", "kind", "max_bytes", "since_unix_s")
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    SINCE_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    kind: str
    max_bytes: int
    since_unix_s: float
    def __init__(self, device_id: _Optional[str] = ..., kind: _Optional[str] = ..., max_bytes: _Optional[int] = ..., since_unix_s: _Optional[float] = ...) -> None: ...

class GetAnswerRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class DeviceAnswer(_message.Message):
    __slots__ = ("id", "device_id", "kind", "is_answered", "error", "gzip", "is_cut", "is_device_online")
    ID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    IS_ANSWERED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    GZIP_FIELD_NUMBER: _ClassVar[int]
    IS_CUT_FIELD_NUMBER: _ClassVar[int]
    IS_DEVICE_ONLINE_FIELD_NUMBER: _ClassVar[int]
    id: str
    device_id: str
    kind: str
    is_answered: bool
    error: str
    gzip: bytes
    is_cut: bool
    is_device_online: bool
    def __init__(self, id: _Optional[str] = ..., device_id: _Optional[str] = ..., kind: _Optional[str] = ..., is_answered: bool = ..., error: _Optional[str] = ..., gzip: _Optional[bytes] = ..., is_cut: bool = ..., is_device_online: bool = ...) -> None: ...

class CreateJoinTokenRequest(_message.Message):
    __slots__ = ("valid_for_s", "labels")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    VALID_FOR_S_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    valid_for_s: float
    labels: _containers.ScalarMap[str, str]
    def __init__(self, valid_for_s: _Optional[float] = ..., labels: _Optional[_Mapping[str, str]] = ...) -> None: ...

class CreateJoinTokenResponse(_message.Message):
    __slots__ = ("token", "expires_at_unix_s")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    token: str
    expires_at_unix_s: float
    def __init__(self, token: _Optional[str] = ..., expires_at_unix_s: _Optional[float] = ...) -> None: ...

class Device(_message.Message):
    __slots__ = ("device_id", "hostname", "labels", "status", "phase", "assigned_release_id", "running_release_id", "generation", "last_seen_unix_s", "device_model", "agent_version", "architecture", "memory_bytes", "error_code", "error_message", "progress", "bundle_digest", "adapters", "note", "pin", "quarantined_by", "hold")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    HOSTNAME_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    ASSIGNED_RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    RUNNING_RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    DEVICE_MODEL_FIELD_NUMBER: _ClassVar[int]
    AGENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_BY_FIELD_NUMBER: _ClassVar[int]
    HOLD_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    hostname: str
    labels: _containers.ScalarMap[str, str]
    status: str
    phase: str
    assigned_release_id: str
    running_release_id: str
    generation: int
    last_seen_unix_s: float
    device_model: str
    agent_version: str
    architecture: str
    memory_bytes: int
    error_code: str
    error_message: str
    progress: float
    bundle_digest: str
    adapters: _containers.RepeatedCompositeFieldContainer[DeviceAdapter]
    note: str
    pin: str
    quarantined_by: str
    hold: str
    def __init__(self, device_id: _Optional[str] = ..., hostname: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., status: _Optional[str] = ..., phase: _Optional[str] = ..., assigned_release_id: _Optional[str] = ..., running_release_id: _Optional[str] = ..., generation: _Optional[int] = ..., last_seen_unix_s: _Optional[float] = ..., device_model: _Optional[str] = ..., agent_version: _Optional[str] = ..., architecture: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., error_code: _Optional[str] = ..., error_message: _Optional[str] = ..., progress: _Optional[float] = ..., bundle_digest: _Optional[str] = ..., adapters: _Optional[_Iterable[_Union[DeviceAdapter, _Mapping]]] = ..., note: _Optional[str] = ..., pin: _Optional[str] = ..., quarantined_by: _Optional[str] = ..., hold: _Optional[str] = ...) -> None: ...

class DeviceAdapter(_message.Message):
    __slots__ = ("name", "revision", "digest")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    revision: str
    digest: str
    def __init__(self, name: _Optional[str] = ..., revision: _Optional[str] = ..., digest: _Optional[str] = ...) -> None: ...

class ListDevicesRequest(_message.Message):
    __slots__ = ("selector",)
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    selector: str
    def __init__(self, selector: _Optional[str] = ...) -> None: ...

class ListDevicesResponse(_message.Message):
    __slots__ = ("devices",)
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    devices: _containers.RepeatedCompositeFieldContainer[Device]
    def __init__(self, devices: _Optional[_Iterable[_Union[Device, _Mapping]]] = ...) -> None: ...

class LabelDeviceRequest(_message.Message):
    __slots__ = ("device_id", "set", "remove")
    class SetEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    SET_FIELD_NUMBER: _ClassVar[int]
    REMOVE_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    set: _containers.ScalarMap[str, str]
    remove: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, device_id: _Optional[str] = ..., set: _Optional[_Mapping[str, str]] = ..., remove: _Optional[_Iterable[str]] = ...) -> None: ...

class RemoveDeviceRequest(_message.Message):
    __slots__ = ("device_id",)
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    def __init__(self, device_id: _Optional[str] = ...) -> None: ...

class RemoveDeviceResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Artifact(_message.Message):
    __slots__ = ("digest", "kind", "name", "revision", "bytes", "base_digest", "published_at_unix_s")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_AT_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    digest: str
    kind: str
    name: str
    revision: str
    bytes: int
    base_digest: str
    published_at_unix_s: float
    def __init__(self, digest: _Optional[str] = ..., kind: _Optional[str] = ..., name: _Optional[str] = ..., revision: _Optional[str] = ..., bytes: _Optional[int] = ..., base_digest: _Optional[str] = ..., published_at_unix_s: _Optional[float] = ...) -> None: ...

class ListArtifactsRequest(_message.Message):
    __slots__ = ("kind",)
    KIND_FIELD_NUMBER: _ClassVar[int]
    kind: str
    def __init__(self, kind: _Optional[str] = ...) -> None: ...

class ListArtifactsResponse(_message.Message):
    __slots__ = ("artifacts",)
    ARTIFACTS_FIELD_NUMBER: _ClassVar[int]
    artifacts: _containers.RepeatedCompositeFieldContainer[Artifact]
    def __init__(self, artifacts: _Optional[_Iterable[_Union[Artifact, _Mapping]]] = ...) -> None: ...

class CreateReleaseRequest(_message.Message):
    __slots__ = ("release_json",)
    RELEASE_JSON_FIELD_NUMBER: _ClassVar[int]
    release_json: bytes
    def __init__(self, release_json: _Optional[bytes] = ...) -> None: ...

class ReleaseInfo(_message.Message):
    __slots__ = ("release_id", "name", "release_json", "created_at_unix_s", "created_by")
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    RELEASE_JSON_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    CREATED_BY_FIELD_NUMBER: _ClassVar[int]
    release_id: str
    name: str
    release_json: bytes
    created_at_unix_s: float
    created_by: str
    def __init__(self, release_id: _Optional[str] = ..., name: _Optional[str] = ..., release_json: _Optional[bytes] = ..., created_at_unix_s: _Optional[float] = ..., created_by: _Optional[str] = ...) -> None: ...

class ListReleasesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListReleasesResponse(_message.Message):
    __slots__ = ("releases",)
    RELEASES_FIELD_NUMBER: _ClassVar[int]
    releases: _containers.RepeatedCompositeFieldContainer[ReleaseInfo]
    def __init__(self, releases: _Optional[_Iterable[_Union[ReleaseInfo, _Mapping]]] = ...) -> None: ...

class PlanRequest(_message.Message):
    __slots__ = ("release", "selector", "spec", "release_json")
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    RELEASE_JSON_FIELD_NUMBER: _ClassVar[int]
    release: str
    selector: str
    spec: RolloutSpec
    release_json: bytes
    def __init__(self, release: _Optional[str] = ..., selector: _Optional[str] = ..., spec: _Optional[_Union[RolloutSpec, _Mapping]] = ..., release_json: _Optional[bytes] = ...) -> None: ...

class PlanResponse(_message.Message):
    __slots__ = ("devices", "waves", "total_bytes", "engine_sharing")
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    WAVES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    ENGINE_SHARING_FIELD_NUMBER: _ClassVar[int]
    devices: _containers.RepeatedCompositeFieldContainer[DevicePlan]
    waves: _containers.RepeatedScalarFieldContainer[str]
    total_bytes: int
    engine_sharing: str
    def __init__(self, devices: _Optional[_Iterable[_Union[DevicePlan, _Mapping]]] = ..., waves: _Optional[_Iterable[str]] = ..., total_bytes: _Optional[int] = ..., engine_sharing: _Optional[str] = ...) -> None: ...

class DevicePlan(_message.Message):
    __slots__ = ("device_id", "hostname", "wave", "ship_bytes", "builds_engine", "build_s", "build_s_known", "peak_disk_bytes", "refusals", "engine", "engine_why", "engine_from", "engine_bytes", "shares_engine", "peak_memory_bytes")
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    HOSTNAME_FIELD_NUMBER: _ClassVar[int]
    WAVE_FIELD_NUMBER: _ClassVar[int]
    SHIP_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUILDS_ENGINE_FIELD_NUMBER: _ClassVar[int]
    BUILD_S_FIELD_NUMBER: _ClassVar[int]
    BUILD_S_KNOWN_FIELD_NUMBER: _ClassVar[int]
    PEAK_DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_WHY_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FROM_FIELD_NUMBER: _ClassVar[int]
    ENGINE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHARES_ENGINE_FIELD_NUMBER: _ClassVar[int]
    PEAK_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    hostname: str
    wave: int
    ship_bytes: int
    builds_engine: bool
    build_s: float
    build_s_known: bool
    peak_disk_bytes: int
    refusals: _containers.RepeatedCompositeFieldContainer[PlanRefusal]
    engine: str
    engine_why: str
    engine_from: str
    engine_bytes: int
    shares_engine: bool
    peak_memory_bytes: int
    def __init__(self, device_id: _Optional[str] = ..., hostname: _Optional[str] = ..., wave: _Optional[int] = ..., ship_bytes: _Optional[int] = ..., builds_engine: bool = ..., build_s: _Optional[float] = ..., build_s_known: bool = ..., peak_disk_bytes: _Optional[int] = ..., refusals: _Optional[_Iterable[_Union[PlanRefusal, _Mapping]]] = ..., engine: _Optional[str] = ..., engine_why: _Optional[str] = ..., engine_from: _Optional[str] = ..., engine_bytes: _Optional[int] = ..., shares_engine: bool = ..., peak_memory_bytes: _Optional[int] = ...) -> None: ...

class PlanRefusal(_message.Message):
    __slots__ = ("code", "need", "have", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    NEED_FIELD_NUMBER: _ClassVar[int]
    HAVE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: str
    need: str
    have: str
    message: str
    def __init__(self, code: _Optional[str] = ..., need: _Optional[str] = ..., have: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class Wave(_message.Message):
    __slots__ = ("count", "percent")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    PERCENT_FIELD_NUMBER: _ClassVar[int]
    count: int
    percent: float
    def __init__(self, count: _Optional[int] = ..., percent: _Optional[float] = ...) -> None: ...

class RolloutSpec(_message.Message):
    __slots__ = ("waves", "soak_s", "success_threshold", "wave_timeout_s", "max_unavailable", "gates", "stratify", "not_before_unix_s", "windows", "download_bytes_per_s", "total_bytes_per_s")
    WAVES_FIELD_NUMBER: _ClassVar[int]
    SOAK_S_FIELD_NUMBER: _ClassVar[int]
    SUCCESS_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    WAVE_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    MAX_UNAVAILABLE_FIELD_NUMBER: _ClassVar[int]
    GATES_FIELD_NUMBER: _ClassVar[int]
    STRATIFY_FIELD_NUMBER: _ClassVar[int]
    NOT_BEFORE_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    WINDOWS_FIELD_NUMBER: _ClassVar[int]
    DOWNLOAD_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    waves: _containers.RepeatedCompositeFieldContainer[Wave]
    soak_s: float
    success_threshold: float
    wave_timeout_s: float
    max_unavailable: int
    gates: _containers.RepeatedCompositeFieldContainer[Gate]
    stratify: _containers.RepeatedScalarFieldContainer[str]
    not_before_unix_s: float
    windows: _containers.RepeatedScalarFieldContainer[str]
    download_bytes_per_s: int
    total_bytes_per_s: int
    def __init__(self, waves: _Optional[_Iterable[_Union[Wave, _Mapping]]] = ..., soak_s: _Optional[float] = ..., success_threshold: _Optional[float] = ..., wave_timeout_s: _Optional[float] = ..., max_unavailable: _Optional[int] = ..., gates: _Optional[_Iterable[_Union[Gate, _Mapping]]] = ..., stratify: _Optional[_Iterable[str]] = ..., not_before_unix_s: _Optional[float] = ..., windows: _Optional[_Iterable[str]] = ..., download_bytes_per_s: _Optional[int] = ..., total_bytes_per_s: _Optional[int] = ...) -> None: ...

class Gate(_message.Message):
    __slots__ = ("name", "check", "on_fail", "min_devices", "min_samples", "scope", "max_failing")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CHECK_FIELD_NUMBER: _ClassVar[int]
    ON_FAIL_FIELD_NUMBER: _ClassVar[int]
    MIN_DEVICES_FIELD_NUMBER: _ClassVar[int]
    MIN_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    MAX_FAILING_FIELD_NUMBER: _ClassVar[int]
    name: str
    check: str
    on_fail: str
    min_devices: int
    min_samples: int
    scope: str
    max_failing: float
    def __init__(self, name: _Optional[str] = ..., check: _Optional[str] = ..., on_fail: _Optional[str] = ..., min_devices: _Optional[int] = ..., min_samples: _Optional[int] = ..., scope: _Optional[str] = ..., max_failing: _Optional[float] = ...) -> None: ...

class GateVerdict(_message.Message):
    __slots__ = ("gate", "wave", "verdict", "detail", "devices", "numbers")
    GATE_FIELD_NUMBER: _ClassVar[int]
    WAVE_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    gate: Gate
    wave: int
    verdict: str
    detail: str
    devices: int
    numbers: _containers.RepeatedCompositeFieldContainer[GateNumber]
    def __init__(self, gate: _Optional[_Union[Gate, _Mapping]] = ..., wave: _Optional[int] = ..., verdict: _Optional[str] = ..., detail: _Optional[str] = ..., devices: _Optional[int] = ..., numbers: _Optional[_Iterable[_Union[GateNumber, _Mapping]]] = ...) -> None: ...

class GateNumber(_message.Message):
    __slots__ = ("expression", "value")
    EXPRESSION_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    expression: str
    value: float
    def __init__(self, expression: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...

class StartRolloutRequest(_message.Message):
    __slots__ = ("release", "selector", "spec", "skip_refused", "supersede", "needs_approval")
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    SKIP_REFUSED_FIELD_NUMBER: _ClassVar[int]
    SUPERSEDE_FIELD_NUMBER: _ClassVar[int]
    NEEDS_APPROVAL_FIELD_NUMBER: _ClassVar[int]
    release: str
    selector: str
    spec: RolloutSpec
    skip_refused: bool
    supersede: bool
    needs_approval: bool
    def __init__(self, release: _Optional[str] = ..., selector: _Optional[str] = ..., spec: _Optional[_Union[RolloutSpec, _Mapping]] = ..., skip_refused: bool = ..., supersede: bool = ..., needs_approval: bool = ...) -> None: ...

class GetRolloutRequest(_message.Message):
    __slots__ = ("rollout_id",)
    ROLLOUT_ID_FIELD_NUMBER: _ClassVar[int]
    rollout_id: str
    def __init__(self, rollout_id: _Optional[str] = ...) -> None: ...

class ListRolloutsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListRolloutsResponse(_message.Message):
    __slots__ = ("rollouts",)
    ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    rollouts: _containers.RepeatedCompositeFieldContainer[Rollout]
    def __init__(self, rollouts: _Optional[_Iterable[_Union[Rollout, _Mapping]]] = ...) -> None: ...

class RolloutActionRequest(_message.Message):
    __slots__ = ("rollout_id", "accept_gates")
    ROLLOUT_ID_FIELD_NUMBER: _ClassVar[int]
    ACCEPT_GATES_FIELD_NUMBER: _ClassVar[int]
    rollout_id: str
    accept_gates: bool
    def __init__(self, rollout_id: _Optional[str] = ..., accept_gates: bool = ...) -> None: ...

class RetryRolloutRequest(_message.Message):
    __slots__ = ("rollout_id", "skip_refused", "supersede")
    ROLLOUT_ID_FIELD_NUMBER: _ClassVar[int]
    SKIP_REFUSED_FIELD_NUMBER: _ClassVar[int]
    SUPERSEDE_FIELD_NUMBER: _ClassVar[int]
    rollout_id: str
    skip_refused: bool
    supersede: bool
    def __init__(self, rollout_id: _Optional[str] = ..., skip_refused: bool = ..., supersede: bool = ...) -> None: ...

class AbortRolloutRequest(_message.Message):
    __slots__ = ("rollout_id", "keep")
    ROLLOUT_ID_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    rollout_id: str
    keep: bool
    def __init__(self, rollout_id: _Optional[str] = ..., keep: bool = ...) -> None: ...

class Rollout(_message.Message):
    __slots__ = ("rollout_id", "release_id", "release_name", "selector", "state", "reason", "wave", "waves", "devices", "spec", "created_at_unix_s", "created_by", "approved_by", "gates", "retry_of", "attempt")
    ROLLOUT_ID_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    RELEASE_NAME_FIELD_NUMBER: _ClassVar[int]
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    WAVE_FIELD_NUMBER: _ClassVar[int]
    WAVES_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    CREATED_BY_FIELD_NUMBER: _ClassVar[int]
    APPROVED_BY_FIELD_NUMBER: _ClassVar[int]
    GATES_FIELD_NUMBER: _ClassVar[int]
    RETRY_OF_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    rollout_id: str
    release_id: str
    release_name: str
    selector: str
    state: str
    reason: str
    wave: int
    waves: int
    devices: _containers.RepeatedCompositeFieldContainer[RolloutDevice]
    spec: RolloutSpec
    created_at_unix_s: float
    created_by: str
    approved_by: str
    gates: _containers.RepeatedCompositeFieldContainer[GateVerdict]
    retry_of: str
    attempt: int
    def __init__(self, rollout_id: _Optional[str] = ..., release_id: _Optional[str] = ..., release_name: _Optional[str] = ..., selector: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., wave: _Optional[int] = ..., waves: _Optional[int] = ..., devices: _Optional[_Iterable[_Union[RolloutDevice, _Mapping]]] = ..., spec: _Optional[_Union[RolloutSpec, _Mapping]] = ..., created_at_unix_s: _Optional[float] = ..., created_by: _Optional[str] = ..., approved_by: _Optional[str] = ..., gates: _Optional[_Iterable[_Union[GateVerdict, _Mapping]]] = ..., retry_of: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class RolloutDevice(_message.Message):
    __slots__ = ("device_id", "hostname", "wave", "outcome", "phase", "progress", "error", "hold", "late", "late_detail")
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    HOSTNAME_FIELD_NUMBER: _ClassVar[int]
    WAVE_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    HOLD_FIELD_NUMBER: _ClassVar[int]
    LATE_FIELD_NUMBER: _ClassVar[int]
    LATE_DETAIL_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    hostname: str
    wave: int
    outcome: str
    phase: str
    progress: float
    error: str
    hold: str
    late: str
    late_detail: str
    def __init__(self, device_id: _Optional[str] = ..., hostname: _Optional[str] = ..., wave: _Optional[int] = ..., outcome: _Optional[str] = ..., phase: _Optional[str] = ..., progress: _Optional[float] = ..., error: _Optional[str] = ..., hold: _Optional[str] = ..., late: _Optional[str] = ..., late_detail: _Optional[str] = ...) -> None: ...

class TopRequest(_message.Message):
    __slots__ = ("selector",)
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    selector: str
    def __init__(self, selector: _Optional[str] = ...) -> None: ...

class TopResponse(_message.Message):
    __slots__ = ("rows",)
    ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedCompositeFieldContainer[TopRow]
    def __init__(self, rows: _Optional[_Iterable[_Union[TopRow, _Mapping]]] = ...) -> None: ...

class TopRow(_message.Message):
    __slots__ = ("device", "metrics", "metrics_at_unix_s")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    METRICS_AT_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    device: Device
    metrics: _containers.ScalarMap[str, float]
    metrics_at_unix_s: float
    def __init__(self, device: _Optional[_Union[Device, _Mapping]] = ..., metrics: _Optional[_Mapping[str, float]] = ..., metrics_at_unix_s: _Optional[float] = ...) -> None: ...

class ListEventsRequest(_message.Message):
    __slots__ = ("device_id", "limit")
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    limit: int
    def __init__(self, device_id: _Optional[str] = ..., limit: _Optional[int] = ...) -> None: ...

class ListEventsResponse(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[Event]
    def __init__(self, events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("at_unix_s", "device_id", "name", "detail_json")
    AT_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    DETAIL_JSON_FIELD_NUMBER: _ClassVar[int]
    at_unix_s: float
    device_id: str
    name: str
    detail_json: str
    def __init__(self, at_unix_s: _Optional[float] = ..., device_id: _Optional[str] = ..., name: _Optional[str] = ..., detail_json: _Optional[str] = ...) -> None: ...

class WhoAmIRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WhoAmIResponse(_message.Message):
    __slots__ = ("name", "role", "may_call")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MAY_CALL_FIELD_NUMBER: _ClassVar[int]
    name: str
    role: str
    may_call: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., role: _Optional[str] = ..., may_call: _Optional[_Iterable[str]] = ...) -> None: ...

class ListAuditRequest(_message.Message):
    __slots__ = ("since_unix_s", "after_seq", "limit")
    SINCE_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    AFTER_SEQ_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    since_unix_s: float
    after_seq: int
    limit: int
    def __init__(self, since_unix_s: _Optional[float] = ..., after_seq: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class ListAuditResponse(_message.Message):
    __slots__ = ("entries", "head", "broken")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    BROKEN_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[AuditEntry]
    head: AuditHead
    broken: str
    def __init__(self, entries: _Optional[_Iterable[_Union[AuditEntry, _Mapping]]] = ..., head: _Optional[_Union[AuditHead, _Mapping]] = ..., broken: _Optional[str] = ...) -> None: ...

class AuditHead(_message.Message):
    __slots__ = ("seq", "hash")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    seq: int
    hash: str
    def __init__(self, seq: _Optional[int] = ..., hash: _Optional[str] = ...) -> None: ...

class AuditEntry(_message.Message):
    __slots__ = ("seq", "at_unix_s", "who", "role", "where", "what", "detail_json", "answers", "result", "message", "hash")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    AT_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    WHO_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    WHERE_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    DETAIL_JSON_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    seq: int
    at_unix_s: float
    who: str
    role: str
    where: str
    what: str
    detail_json: str
    answers: int
    result: str
    message: str
    hash: str
    def __init__(self, seq: _Optional[int] = ..., at_unix_s: _Optional[float] = ..., who: _Optional[str] = ..., role: _Optional[str] = ..., where: _Optional[str] = ..., what: _Optional[str] = ..., detail_json: _Optional[str] = ..., answers: _Optional[int] = ..., result: _Optional[str] = ..., message: _Optional[str] = ..., hash: _Optional[str] = ...) -> None: ...

class RolloutHistoryRequest(_message.Message):
    __slots__ = ("rollout_id",)
    ROLLOUT_ID_FIELD_NUMBER: _ClassVar[int]
    rollout_id: str
    def __init__(self, rollout_id: _Optional[str] = ...) -> None: ...

class Group(_message.Message):
    __slots__ = ("name", "device_ids", "selector", "created_at_unix_s", "created_by", "matching")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DEVICE_IDS_FIELD_NUMBER: _ClassVar[int]
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    CREATED_BY_FIELD_NUMBER: _ClassVar[int]
    MATCHING_FIELD_NUMBER: _ClassVar[int]
    name: str
    device_ids: _containers.RepeatedScalarFieldContainer[str]
    selector: str
    created_at_unix_s: float
    created_by: str
    matching: int
    def __init__(self, name: _Optional[str] = ..., device_ids: _Optional[_Iterable[str]] = ..., selector: _Optional[str] = ..., created_at_unix_s: _Optional[float] = ..., created_by: _Optional[str] = ..., matching: _Optional[int] = ...) -> None: ...

class SaveGroupRequest(_message.Message):
    __slots__ = ("name", "device_ids", "selector", "replace")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DEVICE_IDS_FIELD_NUMBER: _ClassVar[int]
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    name: str
    device_ids: _containers.RepeatedScalarFieldContainer[str]
    selector: str
    replace: bool
    def __init__(self, name: _Optional[str] = ..., device_ids: _Optional[_Iterable[str]] = ..., selector: _Optional[str] = ..., replace: bool = ...) -> None: ...

class ListGroupsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListGroupsResponse(_message.Message):
    __slots__ = ("groups",)
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[Group]
    def __init__(self, groups: _Optional[_Iterable[_Union[Group, _Mapping]]] = ...) -> None: ...

class DeleteGroupRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DeleteGroupResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PinDeviceRequest(_message.Message):
    __slots__ = ("device_id", "unpin", "reason")
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    UNPIN_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    unpin: bool
    reason: str
    def __init__(self, device_id: _Optional[str] = ..., unpin: bool = ..., reason: _Optional[str] = ...) -> None: ...

class QuarantineDeviceRequest(_message.Message):
    __slots__ = ("device_id", "lift", "reason")
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    LIFT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    lift: bool
    reason: str
    def __init__(self, device_id: _Optional[str] = ..., lift: bool = ..., reason: _Optional[str] = ...) -> None: ...

class DiffReleasesRequest(_message.Message):
    __slots__ = ("before", "after")
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    before: str
    after: str
    def __init__(self, before: _Optional[str] = ..., after: _Optional[str] = ...) -> None: ...

class DiffReleasesResponse(_message.Message):
    __slots__ = ("differences",)
    DIFFERENCES_FIELD_NUMBER: _ClassVar[int]
    differences: _containers.RepeatedCompositeFieldContainer[ReleaseDifference]
    def __init__(self, differences: _Optional[_Iterable[_Union[ReleaseDifference, _Mapping]]] = ...) -> None: ...

class ReleaseDifference(_message.Message):
    __slots__ = ("path", "before", "after")
    PATH_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    path: str
    before: str
    after: str
    def __init__(self, path: _Optional[str] = ..., before: _Optional[str] = ..., after: _Optional[str] = ...) -> None: ...

class ListSharedEnginesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListSharedEnginesResponse(_message.Message):
    __slots__ = ("engines", "policy", "stored_bytes", "max_bytes")
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    engines: _containers.RepeatedCompositeFieldContainer[SharedEngine]
    policy: str
    stored_bytes: int
    max_bytes: int
    def __init__(self, engines: _Optional[_Iterable[_Union[SharedEngine, _Mapping]]] = ..., policy: _Optional[str] = ..., stored_bytes: _Optional[int] = ..., max_bytes: _Optional[int] = ...) -> None: ...

class SharedEngine(_message.Message):
    __slots__ = ("key_digest", "site", "state", "engine_digest", "bytes", "built_by", "built_at_unix_s", "taken", "bad", "failed", "why", "backend")
    KEY_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    BUILT_BY_FIELD_NUMBER: _ClassVar[int]
    BUILT_AT_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    BAD_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    key_digest: str
    site: str
    state: str
    engine_digest: str
    bytes: int
    built_by: str
    built_at_unix_s: float
    taken: int
    bad: int
    failed: int
    why: str
    backend: str
    def __init__(self, key_digest: _Optional[str] = ..., site: _Optional[str] = ..., state: _Optional[str] = ..., engine_digest: _Optional[str] = ..., bytes: _Optional[int] = ..., built_by: _Optional[str] = ..., built_at_unix_s: _Optional[float] = ..., taken: _Optional[int] = ..., bad: _Optional[int] = ..., failed: _Optional[int] = ..., why: _Optional[str] = ..., backend: _Optional[str] = ...) -> None: ...

class RemoveSharedEngineRequest(_message.Message):
    __slots__ = ("key_digest", "site")
    KEY_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    key_digest: str
    site: str
    def __init__(self, key_digest: _Optional[str] = ..., site: _Optional[str] = ...) -> None: ...

class RemoveSharedEngineResponse(_message.Message):
    __slots__ = ("removed",)
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    removed: int
    def __init__(self, removed: _Optional[int] = ...) -> None: ...

class ListExperimentsRequest(_message.Message):
    __slots__ = ("selector", "name", "with_ended")
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    WITH_ENDED_FIELD_NUMBER: _ClassVar[int]
    selector: str
    name: str
    with_ended: bool
    def __init__(self, selector: _Optional[str] = ..., name: _Optional[str] = ..., with_ended: bool = ...) -> None: ...

class ListExperimentsResponse(_message.Message):
    __slots__ = ("experiments",)
    EXPERIMENTS_FIELD_NUMBER: _ClassVar[int]
    experiments: _containers.RepeatedCompositeFieldContainer[Experiment]
    def __init__(self, experiments: _Optional[_Iterable[_Union[Experiment, _Mapping]]] = ...) -> None: ...

class Experiment(_message.Message):
    __slots__ = ("name", "release_ids", "salt", "devices", "arms", "rules", "min_requests", "promote_when", "incumbent", "candidate", "verdict")
    NAME_FIELD_NUMBER: _ClassVar[int]
    RELEASE_IDS_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    ARMS_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    MIN_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    PROMOTE_WHEN_FIELD_NUMBER: _ClassVar[int]
    INCUMBENT_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    name: str
    release_ids: _containers.RepeatedScalarFieldContainer[str]
    salt: str
    devices: int
    arms: _containers.RepeatedCompositeFieldContainer[ExperimentArm]
    rules: _containers.RepeatedCompositeFieldContainer[GateVerdict]
    min_requests: int
    promote_when: str
    incumbent: str
    candidate: str
    verdict: str
    def __init__(self, name: _Optional[str] = ..., release_ids: _Optional[_Iterable[str]] = ..., salt: _Optional[str] = ..., devices: _Optional[int] = ..., arms: _Optional[_Iterable[_Union[ExperimentArm, _Mapping]]] = ..., rules: _Optional[_Iterable[_Union[GateVerdict, _Mapping]]] = ..., min_requests: _Optional[int] = ..., promote_when: _Optional[str] = ..., incumbent: _Optional[str] = ..., candidate: _Optional[str] = ..., verdict: _Optional[str] = ...) -> None: ...

class ExperimentArm(_message.Message):
    __slots__ = ("name", "percent", "adapter", "use_case", "identity", "devices", "counts", "shadow")
    class CountsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class ShadowEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    PERCENT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    USE_CASE_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    name: str
    percent: float
    adapter: str
    use_case: str
    identity: str
    devices: int
    counts: _containers.ScalarMap[str, float]
    shadow: _containers.ScalarMap[str, float]
    def __init__(self, name: _Optional[str] = ..., percent: _Optional[float] = ..., adapter: _Optional[str] = ..., use_case: _Optional[str] = ..., identity: _Optional[str] = ..., devices: _Optional[int] = ..., counts: _Optional[_Mapping[str, float]] = ..., shadow: _Optional[_Mapping[str, float]] = ...) -> None: ...

class PromotionRequest(_message.Message):
    __slots__ = ("name", "arm", "release", "selector", "spec", "skip_refused", "supersede", "needs_approval", "force", "reason")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARM_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    SKIP_REFUSED_FIELD_NUMBER: _ClassVar[int]
    SUPERSEDE_FIELD_NUMBER: _ClassVar[int]
    NEEDS_APPROVAL_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    arm: str
    release: str
    selector: str
    spec: RolloutSpec
    skip_refused: bool
    supersede: bool
    needs_approval: bool
    force: bool
    reason: str
    def __init__(self, name: _Optional[str] = ..., arm: _Optional[str] = ..., release: _Optional[str] = ..., selector: _Optional[str] = ..., spec: _Optional[_Union[RolloutSpec, _Mapping]] = ..., skip_refused: bool = ..., supersede: bool = ..., needs_approval: bool = ..., force: bool = ..., reason: _Optional[str] = ...) -> None: ...

class Promotion(_message.Message):
    __slots__ = ("experiment", "arm", "from_release_id", "release_id", "rules", "refusal", "notes", "differences", "plan", "rollout")
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    ARM_FIELD_NUMBER: _ClassVar[int]
    FROM_RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCES_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    ROLLOUT_FIELD_NUMBER: _ClassVar[int]
    experiment: str
    arm: str
    from_release_id: str
    release_id: str
    rules: _containers.RepeatedCompositeFieldContainer[GateVerdict]
    refusal: str
    notes: _containers.RepeatedScalarFieldContainer[str]
    differences: _containers.RepeatedCompositeFieldContainer[ReleaseDifference]
    plan: PlanResponse
    rollout: Rollout
    def __init__(self, experiment: _Optional[str] = ..., arm: _Optional[str] = ..., from_release_id: _Optional[str] = ..., release_id: _Optional[str] = ..., rules: _Optional[_Iterable[_Union[GateVerdict, _Mapping]]] = ..., refusal: _Optional[str] = ..., notes: _Optional[_Iterable[str]] = ..., differences: _Optional[_Iterable[_Union[ReleaseDifference, _Mapping]]] = ..., plan: _Optional[_Union[PlanResponse, _Mapping]] = ..., rollout: _Optional[_Union[Rollout, _Mapping]] = ...) -> None: ...
