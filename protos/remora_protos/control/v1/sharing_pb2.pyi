from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ClaimEngineRequest(_message.Message):
    __slots__ = ("key_json",)
    KEY_JSON_FIELD_NUMBER: _ClassVar[int]
    key_json: bytes
    def __init__(self, key_json: _Optional[bytes] = ...) -> None: ...

class ClaimEngineResponse(_message.Message):
    __slots__ = ("build", "fetch", "wait", "alone")
    BUILD_FIELD_NUMBER: _ClassVar[int]
    FETCH_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    ALONE_FIELD_NUMBER: _ClassVar[int]
    build: BuildEngine
    fetch: FetchEngine
    wait: WaitForEngine
    alone: BuildEngineAlone
    def __init__(self, build: _Optional[_Union[BuildEngine, _Mapping]] = ..., fetch: _Optional[_Union[FetchEngine, _Mapping]] = ..., wait: _Optional[_Union[WaitForEngine, _Mapping]] = ..., alone: _Optional[_Union[BuildEngineAlone, _Mapping]] = ...) -> None: ...

class BuildEngine(_message.Message):
    __slots__ = ("lease_s", "why")
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    lease_s: float
    why: str
    def __init__(self, lease_s: _Optional[float] = ..., why: _Optional[str] = ...) -> None: ...

class FetchEngine(_message.Message):
    __slots__ = ("digest", "bytes", "built_by")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    BUILT_BY_FIELD_NUMBER: _ClassVar[int]
    digest: str
    bytes: int
    built_by: str
    def __init__(self, digest: _Optional[str] = ..., bytes: _Optional[int] = ..., built_by: _Optional[str] = ...) -> None: ...

class WaitForEngine(_message.Message):
    __slots__ = ("why", "ask_again_s")
    WHY_FIELD_NUMBER: _ClassVar[int]
    ASK_AGAIN_S_FIELD_NUMBER: _ClassVar[int]
    why: str
    ask_again_s: float
    def __init__(self, why: _Optional[str] = ..., ask_again_s: _Optional[float] = ...) -> None: ...

class BuildEngineAlone(_message.Message):
    __slots__ = ("why",)
    WHY_FIELD_NUMBER: _ClassVar[int]
    why: str
    def __init__(self, why: _Optional[str] = ...) -> None: ...

class GiveUpEngineRequest(_message.Message):
    __slots__ = ("key_digest", "blames_model", "why")
    KEY_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BLAMES_MODEL_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    key_digest: str
    blames_model: bool
    why: str
    def __init__(self, key_digest: _Optional[str] = ..., blames_model: bool = ..., why: _Optional[str] = ...) -> None: ...

class GiveUpEngineResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RejectEngineRequest(_message.Message):
    __slots__ = ("key_digest", "engine_digest", "why")
    KEY_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ENGINE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    key_digest: str
    engine_digest: str
    why: str
    def __init__(self, key_digest: _Optional[str] = ..., engine_digest: _Optional[str] = ..., why: _Optional[str] = ...) -> None: ...

class RejectEngineResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OfferEngineRequest(_message.Message):
    __slots__ = ("key_digest", "manifest_json")
    KEY_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_JSON_FIELD_NUMBER: _ClassVar[int]
    key_digest: str
    manifest_json: bytes
    def __init__(self, key_digest: _Optional[str] = ..., manifest_json: _Optional[bytes] = ...) -> None: ...

class OfferEngineResponse(_message.Message):
    __slots__ = ("missing_chunks",)
    MISSING_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    missing_chunks: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, missing_chunks: _Optional[_Iterable[str]] = ...) -> None: ...

class PutEngineChunkRequest(_message.Message):
    __slots__ = ("key_digest", "chunk_digest", "data")
    KEY_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CHUNK_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    key_digest: str
    chunk_digest: str
    data: bytes
    def __init__(self, key_digest: _Optional[str] = ..., chunk_digest: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class PutEngineChunkResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FinishEngineRequest(_message.Message):
    __slots__ = ("key_digest",)
    KEY_DIGEST_FIELD_NUMBER: _ClassVar[int]
    key_digest: str
    def __init__(self, key_digest: _Optional[str] = ...) -> None: ...

class FinishEngineResponse(_message.Message):
    __slots__ = ("engine_digest",)
    ENGINE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    engine_digest: str
    def __init__(self, engine_digest: _Optional[str] = ...) -> None: ...
