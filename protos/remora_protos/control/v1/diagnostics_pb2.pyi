from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class DiagnosticRequest(_message.Message):
    __slots__ = ("id", "kind", "max_bytes", "since_unix_s")
    ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    SINCE_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    id: str
    kind: str
    max_bytes: int
    since_unix_s: float
    def __init__(self, id: _Optional[str] = ..., kind: _Optional[str] = ..., max_bytes: _Optional[int] = ..., since_unix_s: _Optional[float] = ...) -> None: ...

class DeliverRequest(_message.Message):
    __slots__ = ("id", "gzip", "error", "is_cut")
    ID_FIELD_NUMBER: _ClassVar[int]
    GZIP_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    IS_CUT_FIELD_NUMBER: _ClassVar[int]
    id: str
    gzip: bytes
    error: str
    is_cut: bool
    def __init__(self, id: _Optional[str] = ..., gzip: _Optional[bytes] = ..., error: _Optional[str] = ..., is_cut: bool = ...) -> None: ...

class DeliverResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
