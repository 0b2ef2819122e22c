"""The device's identity on disk: key, certificate, CA, device id. Replaced whole or not at all.

Knows how to keep it, not how to obtain it (`join`, `renewal`).
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from remora_agent.config import check_address
from remora_agent.control.layout import replace_file, sync_directory
from remora_contract.digests import canonical_json
from remora_contract.errors import NotFound, Refused
from remora_contract.strict import loads

_FILES = ("key.pem", "cert.pem", "ca.pem", "device.json")


@dataclass(frozen=True)
class DeviceDocument:
    device_id: str
    controller: str
    enrolment: str

    def __post_init__(self) -> None:
        check_address(self.controller, "controller")
        check_address(self.enrolment, "enrolment")


@dataclass(frozen=True)
class Identity:
    device_id: str
    controller: str  # HOST:PORT of the fleet port
    enrolment: str  # HOST:PORT of the enrolment port: the way back after an expiry
    key_pem: bytes
    certificate_pem: bytes
    ca_pem: bytes


def load_identity(directory: Path) -> Identity:
    """Raises NotFound when the device has not joined, Refused when files are missing."""
    _finish_interrupted_store(directory)
    if not directory.is_dir():
        raise NotFound(
            f"{directory} does not exist: this device has not joined; run "
            "remora-agent join HOST:7441 --token TOKEN"
        )
    try:
        document, key, certificate, ca = (
            (directory / name).read_bytes() for name in ("device.json", *_FILES[:3])
        )
    except OSError as e:
        raise Refused(
            f"identity is incomplete: {e.filename}: {e.strerror}; join again with --force"
        ) from e
    device = loads(DeviceDocument, document, str(directory / "device.json"))
    return Identity(device.device_id, device.controller, device.enrolment, key, certificate, ca)


def store_identity(directory: Path, identity: Identity) -> None:
    """Writes a new directory beside the old one and renames. device.json is written last."""
    fresh, stale = _fresh(directory), _stale(directory)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(mode=0o700, parents=True)
    document = DeviceDocument(identity.device_id, identity.controller, identity.enrolment)
    contents = (
        identity.key_pem,
        identity.certificate_pem,
        identity.ca_pem,
        canonical_json(document),
    )
    for name, data in zip(_FILES, contents, strict=True):
        _write_new(fresh / name, data)
    sync_directory(fresh)
    if directory.exists():
        shutil.rmtree(stale, ignore_errors=True)
        directory.rename(stale)
    fresh.rename(directory)
    sync_directory(directory.parent)
    shutil.rmtree(stale, ignore_errors=True)


def replace_certificate(directory: Path, certificate_pem: bytes, ca_pem: bytes) -> None:
    """After a renewal: the key stays, the certificate changes in one rename."""
    if (directory / "ca.pem").read_bytes() != ca_pem:
        replace_file(directory / "ca.pem", ca_pem, mode=0o600)
    replace_file(directory / "cert.pem", certificate_pem, mode=0o600)


def _write_new(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _finish_interrupted_store(directory: Path) -> None:
    """Power was cut between the two renames: take the new one when whole, else the old one."""
    if directory.exists():
        return
    for candidate in (_fresh(directory), _stale(directory)):
        if _is_whole(candidate):
            candidate.rename(directory)
            return


def _is_whole(directory: Path) -> bool:
    try:
        json.loads((directory / "device.json").read_bytes())
    except (OSError, ValueError):
        return False
    return all((directory / name).is_file() for name in _FILES)


def _fresh(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.new")


def _stale(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.old")
