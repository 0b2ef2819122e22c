from remora_protos.control.v1 import diagnostics_pb2 as _diagnostics_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JoinRequest(_message.Message):
    __slots__ = ("token", "csr_pem", "facts", "labels")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    CSR_PEM_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    token: str
    csr_pem: bytes
    facts: DeviceFacts
    labels: _containers.ScalarMap[str, str]
    def __init__(self, token: _Optional[str] = ..., csr_pem: _Optional[bytes] = ..., facts: _Optional[_Union[DeviceFacts, _Mapping]] = ..., labels: _Optional[_Mapping[str, str]] = ...) -> None: ...

class JoinResponse(_message.Message):
    __slots__ = ("device_id", "certificate_pem", "ca_pem", "fleet_port")
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    CA_PEM_FIELD_NUMBER: _ClassVar[int]
    FLEET_PORT_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    certificate_pem: bytes
    ca_pem: bytes
    fleet_port: int
    def __init__(self, device_id: _Optional[str] = ..., certificate_pem: _Optional[bytes] = ..., ca_pem: _Optional[bytes] = ..., fleet_port: _Optional[int] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("csr_pem",)
    CSR_PEM_FIELD_NUMBER: _ClassVar[int]
    csr_pem: bytes
    def __init__(self, csr_pem: _Optional[bytes] = ...) -> None: ...

class RenewExpiredRequest(_message.Message):
    __slots__ = ("certificate_pem", "csr_pem")
    CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    CSR_PEM_FIELD_NUMBER: _ClassVar[int]
    certificate_pem: bytes
    csr_pem: bytes
    def __init__(self, certificate_pem: _Optional[bytes] = ..., csr_pem: _Optional[bytes] = ...) -> None: ...

class RenewResponse(_message.Message):
    __slots__ = ("certificate_pem", "ca_pem")
    CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    CA_PEM_FIELD_NUMBER: _ClassVar[int]
    certificate_pem: bytes
    ca_pem: bytes
    def __init__(self, certificate_pem: _Optional[bytes] = ..., ca_pem: _Optional[bytes] = ...) -> None: ...

class DeviceFacts(_message.Message):
    __slots__ = ("machine_id", "hostname", "agent_version", "architecture", "device_model", "memory_bytes", "disk_free_bytes", "backends", "cores", "engine_key", "engine_rows", "engine_context", "memory_floor_bytes", "disk_floor_bytes", "gpu_memory_bytes", "gpu_shares_memory")
    class BackendsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class EngineKeyEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    MACHINE_ID_FIELD_NUMBER: _ClassVar[int]
    HOSTNAME_FIELD_NUMBER: _ClassVar[int]
    AGENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_MODEL_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    BACKENDS_FIELD_NUMBER: _ClassVar[int]
    CORES_FIELD_NUMBER: _ClassVar[int]
    ENGINE_KEY_FIELD_NUMBER: _ClassVar[int]
    ENGINE_ROWS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FLOOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_FLOOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    GPU_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    GPU_SHARES_MEMORY_FIELD_NUMBER: _ClassVar[int]
    machine_id: str
    hostname: str
    agent_version: str
    architecture: str
    device_model: str
    memory_bytes: int
    disk_free_bytes: int
    backends: _containers.ScalarMap[str, str]
    cores: int
    engine_key: _containers.ScalarMap[str, str]
    engine_rows: int
    engine_context: int
    memory_floor_bytes: int
    disk_floor_bytes: int
    gpu_memory_bytes: int
    gpu_shares_memory: bool
    def __init__(self, machine_id: _Optional[str] = ..., hostname: _Optional[str] = ..., agent_version: _Optional[str] = ..., architecture: _Optional[str] = ..., device_model: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., disk_free_bytes: _Optional[int] = ..., backends: _Optional[_Mapping[str, str]] = ..., cores: _Optional[int] = ..., engine_key: _Optional[_Mapping[str, str]] = ..., engine_rows: _Optional[int] = ..., engine_context: _Optional[int] = ..., memory_floor_bytes: _Optional[int] = ..., disk_floor_bytes: _Optional[int] = ..., gpu_memory_bytes: _Optional[int] = ..., gpu_shares_memory: bool = ...) -> None: ...

class SyncRequest(_message.Message):
    __slots__ = ("facts", "labels", "reported", "seq", "boot_id", "events", "metrics", "known_generation", "sent_at_unix_s", "held_fingerprint", "held", "fetching")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    FACTS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    REPORTED_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    KNOWN_GENERATION_FIELD_NUMBER: _ClassVar[int]
    SENT_AT_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    HELD_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    FETCHING_FIELD_NUMBER: _ClassVar[int]
    facts: DeviceFacts
    labels: _containers.ScalarMap[str, str]
    reported: ReportedState
    seq: int
    boot_id: str
    events: _containers.RepeatedCompositeFieldContainer[DeviceEvent]
    metrics: _containers.RepeatedCompositeFieldContainer[Metric]
    known_generation: int
    sent_at_unix_s: float
    held_fingerprint: int
    held: HeldArtifacts
    fetching: Fetching
    def __init__(self, facts: _Optional[_Union[DeviceFacts, _Mapping]] = ..., labels: _Optional[_Mapping[str, str]] = ..., reported: _Optional[_Union[ReportedState, _Mapping]] = ..., seq: _Optional[int] = ..., boot_id: _Optional[str] = ..., events: _Optional[_Iterable[_Union[DeviceEvent, _Mapping]]] = ..., metrics: _Optional[_Iterable[_Union[Metric, _Mapping]]] = ..., known_generation: _Optional[int] = ..., sent_at_unix_s: _Optional[float] = ..., held_fingerprint: _Optional[int] = ..., held: _Optional[_Union[HeldArtifacts, _Mapping]] = ..., fetching: _Optional[_Union[Fetching, _Mapping]] = ...) -> None: ...

class Fetching(_message.Message):
    __slots__ = ("limit_bytes_per_s", "share_bytes_per_s")
    LIMIT_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    SHARE_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    limit_bytes_per_s: int
    share_bytes_per_s: int
    def __init__(self, limit_bytes_per_s: _Optional[int] = ..., share_bytes_per_s: _Optional[int] = ...) -> None: ...

class HeldArtifacts(_message.Message):
    __slots__ = ("kept", "loose", "built")
    KEPT_FIELD_NUMBER: _ClassVar[int]
    LOOSE_FIELD_NUMBER: _ClassVar[int]
    BUILT_FIELD_NUMBER: _ClassVar[int]
    kept: _containers.RepeatedScalarFieldContainer[bytes]
    loose: _containers.RepeatedScalarFieldContainer[bytes]
    built: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, kept: _Optional[_Iterable[bytes]] = ..., loose: _Optional[_Iterable[bytes]] = ..., built: _Optional[_Iterable[bytes]] = ...) -> None: ...

class SyncResponse(_message.Message):
    __slots__ = ("not_modified", "desired", "next_sync_after_s", "events_stored_up_to", "maintenance_windows", "diagnostics", "wants_held", "sample_every_s", "download_share")
    NOT_MODIFIED_FIELD_NUMBER: _ClassVar[int]
    DESIRED_FIELD_NUMBER: _ClassVar[int]
    NEXT_SYNC_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    EVENTS_STORED_UP_TO_FIELD_NUMBER: _ClassVar[int]
    MAINTENANCE_WINDOWS_FIELD_NUMBER: _ClassVar[int]
    DIAGNOSTICS_FIELD_NUMBER: _ClassVar[int]
    WANTS_HELD_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_EVERY_S_FIELD_NUMBER: _ClassVar[int]
    DOWNLOAD_SHARE_FIELD_NUMBER: _ClassVar[int]
    not_modified: NotModified
    desired: DesiredState
    next_sync_after_s: float
    events_stored_up_to: int
    maintenance_windows: _containers.RepeatedScalarFieldContainer[str]
    diagnostics: _containers.RepeatedCompositeFieldContainer[_diagnostics_pb2.DiagnosticRequest]
    wants_held: bool
    sample_every_s: float
    download_share: DownloadShare
    def __init__(self, not_modified: _Optional[_Union[NotModified, _Mapping]] = ..., desired: _Optional[_Union[DesiredState, _Mapping]] = ..., next_sync_after_s: _Optional[float] = ..., events_stored_up_to: _Optional[int] = ..., maintenance_windows: _Optional[_Iterable[str]] = ..., diagnostics: _Optional[_Iterable[_Union[_diagnostics_pb2.DiagnosticRequest, _Mapping]]] = ..., wants_held: bool = ..., sample_every_s: _Optional[float] = ..., download_share: _Optional[_Union[DownloadShare, _Mapping]] = ...) -> None: ...

class DownloadShare(_message.Message):
    __slots__ = ("bytes_per_s", "for_s")
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    FOR_S_FIELD_NUMBER: _ClassVar[int]
    bytes_per_s: int
    for_s: float
    def __init__(self, bytes_per_s: _Optional[int] = ..., for_s: _Optional[float] = ...) -> None: ...

class NotModified(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DesiredState(_message.Message):
    __slots__ = ("generation", "release_id", "release_json", "rollout_id", "soak_s", "is_rollback", "download_bytes_per_s", "shares_bandwidth")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    RELEASE_JSON_FIELD_NUMBER: _ClassVar[int]
    ROLLOUT_ID_FIELD_NUMBER: _ClassVar[int]
    SOAK_S_FIELD_NUMBER: _ClassVar[int]
    IS_ROLLBACK_FIELD_NUMBER: _ClassVar[int]
    DOWNLOAD_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    SHARES_BANDWIDTH_FIELD_NUMBER: _ClassVar[int]
    generation: int
    release_id: str
    release_json: bytes
    rollout_id: str
    soak_s: float
    is_rollback: bool
    download_bytes_per_s: int
    shares_bandwidth: bool
    def __init__(self, generation: _Optional[int] = ..., release_id: _Optional[str] = ..., release_json: _Optional[bytes] = ..., rollout_id: _Optional[str] = ..., soak_s: _Optional[float] = ..., is_rollback: bool = ..., download_bytes_per_s: _Optional[int] = ..., shares_bandwidth: bool = ...) -> None: ...

class ReportedState(_message.Message):
    __slots__ = ("phase", "generation", "release_id", "running_release_id", "bundle_digest", "adapters", "error_code", "error_message", "progress", "hold", "hold_until_unix_s")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    RUNNING_RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    HOLD_FIELD_NUMBER: _ClassVar[int]
    HOLD_UNTIL_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    phase: str
    generation: int
    release_id: str
    running_release_id: str
    bundle_digest: str
    adapters: _containers.RepeatedCompositeFieldContainer[ServingAdapter]
    error_code: str
    error_message: str
    progress: float
    hold: str
    hold_until_unix_s: float
    def __init__(self, phase: _Optional[str] = ..., generation: _Optional[int] = ..., release_id: _Optional[str] = ..., running_release_id: _Optional[str] = ..., bundle_digest: _Optional[str] = ..., adapters: _Optional[_Iterable[_Union[ServingAdapter, _Mapping]]] = ..., error_code: _Optional[str] = ..., error_message: _Optional[str] = ..., progress: _Optional[float] = ..., hold: _Optional[str] = ..., hold_until_unix_s: _Optional[float] = ...) -> None: ...

class ServingAdapter(_message.Message):
    __slots__ = ("name", "revision", "digest", "epoch")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    name: str
    revision: str
    digest: str
    epoch: int
    def __init__(self, name: _Optional[str] = ..., revision: _Optional[str] = ..., digest: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class DeviceEvent(_message.Message):
    __slots__ = ("seq", "at_unix_s", "name", "detail_json")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    AT_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    DETAIL_JSON_FIELD_NUMBER: _ClassVar[int]
    seq: int
    at_unix_s: float
    name: str
    detail_json: str
    def __init__(self, seq: _Optional[int] = ..., at_unix_s: _Optional[float] = ..., name: _Optional[str] = ..., detail_json: _Optional[str] = ...) -> None: ...

class Metric(_message.Message):
    __slots__ = ("name", "value", "at_unix_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    AT_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: float
    at_unix_s: float
    def __init__(self, name: _Optional[str] = ..., value: _Optional[float] = ..., at_unix_s: _Optional[float] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Poke(_message.Message):
    __slots__ = ("generation",)
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    generation: int
    def __init__(self, generation: _Optional[int] = ...) -> None: ...

class GetManifestRequest(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: str
    def __init__(self, digest: _Optional[str] = ...) -> None: ...

class GetManifestResponse(_message.Message):
    __slots__ = ("manifest_json",)
    MANIFEST_JSON_FIELD_NUMBER: _ClassVar[int]
    manifest_json: bytes
    def __init__(self, manifest_json: _Optional[bytes] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("chunk_digest", "offset", "length")
    CHUNK_DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    chunk_digest: str
    offset: int
    length: int
    def __init__(self, chunk_digest: _Optional[str] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class FetchResponse(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...
