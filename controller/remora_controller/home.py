"""The controller's directory: what `init` writes and `serve` reads. Owns paths and file modes.

DIR/
  ca.pem  ca.key          the fleet's authority; whoever has ca.key owns the fleet
  server.pem  server.key
  operator/               credentials of the first operator: hand it to `remora --credentials`
  controller.toml         where to listen, and limits
  controller.db           devices, releases, rollouts
  repository/             published artifacts (remora-build publish)
  shared-engines/         what devices built for others of their class
  listening.json          while it runs: the ports it got
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from remora_contract.errors import Conflict, DocumentInvalid, NotFound, Refused
from remora_contract.strict import parse
from remora_controller import pki
from remora_controller.sharing.policy import Policy

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
FLEET_PORT = 7440
ENROLMENT_PORT = 7441
METRICS_PORT = 7442

_CONTROLLER_TOML = """\
# Where this controller listens. Every port but metrics speaks TLS, so they may face a network.
listen = "0.0.0.0:7440"            # devices and operators (mutual TLS)
enrolment_listen = "0.0.0.0:7441"  # joining devices (server TLS)
metrics_listen = "127.0.0.1:7442"  # Prometheus (plain HTTP: keep it on loopback)
sync_interval_s = 10.0             # how often an idle device reports
offline_after_s = 45.0             # a device that was silent for so long counts as offline
rollouts_need_approval = false     # true: somebody else than its author approves every rollout
engine_sharing = "off"             # off, site, all: who runs engines that other devices built
"""


@dataclass(frozen=True)
class ControllerConfig:
    """controller.toml."""

    listen: str = f"0.0.0.0:{FLEET_PORT}"
    enrolment_listen: str = f"0.0.0.0:{ENROLMENT_PORT}"
    metrics_listen: str = f"127.0.0.1:{METRICS_PORT}"
    sync_interval_s: float = 10.0
    offline_after_s: float = 45.0
    repository: str = "repository"  # relative to the directory
    rollouts_need_approval: bool = False  # also those started without --needs-approval
    engine_sharing: Policy = "off"  # who runs engines that other devices built
    engine_lease_s: float = 60.0  # a builder that was silent for so long is replaced
    engine_wait_s: float = 1800.0  # a device waits no longer for another's build
    shared_engines_bytes: int = 16 << 30  # on the controller's disk

    def __post_init__(self) -> None:
        _check_sharing(self)
        if not 0.05 <= self.sync_interval_s <= 3600:
            raise ValueError("sync_interval_s is between 0.05 and 3600")
        if self.offline_after_s < 2 * self.sync_interval_s:
            raise ValueError("offline_after_s is at least twice sync_interval_s")


def _check_sharing(config: ControllerConfig) -> None:
    if not 1.0 <= config.engine_lease_s <= 3600:
        raise ValueError("engine_lease_s is between 1 and 3600")
    if not config.engine_lease_s <= config.engine_wait_s <= 86_400:
        raise ValueError("engine_wait_s is between engine_lease_s and 86400")
    if config.shared_engines_bytes < 1 << 20:
        raise ValueError("shared_engines_bytes is at least 1048576")


@dataclass(frozen=True)
class OperatorConfig:
    """operator/controller.toml: where an operator finds the controller."""

    address: str


@dataclass(frozen=True)
class Home:
    root: Path

    @property
    def ca(self) -> Path:
        return self.root / "ca.pem"

    @property
    def ca_key(self) -> Path:
        return self.root / "ca.key"

    @property
    def server(self) -> Path:
        return self.root / "server.pem"

    @property
    def server_key(self) -> Path:
        return self.root / "server.key"

    @property
    def operator(self) -> Path:
        return self.root / "operator"

    @property
    def config(self) -> Path:
        return self.root / "controller.toml"

    @property
    def database(self) -> Path:
        return self.root / "controller.db"

    @property
    def repository(self) -> Path:
        return self.root / "repository"

    @property
    def shared_engines(self) -> Path:
        return self.root / "shared-engines"

    @property
    def listening(self) -> Path:
        return self.root / "listening.json"

    def authority(self) -> pki.Authority:
        return pki.Authority(pki.KeyPair(_read(self.ca), _read(self.ca_key)))

    def server_pair(self) -> pki.KeyPair:
        return pki.KeyPair(_read(self.server), _read(self.server_key))

    def load_config(self) -> ControllerConfig:
        return load_toml(ControllerConfig, self.config)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One controller per directory. Raises Refused when another one runs."""
        with (self.root / "controller.lock").open("w") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                raise Refused(
                    f"another controller already serves {self.root}; stop it first"
                ) from e
            yield


def create(root: Path, addresses: Sequence[str], now: datetime) -> Home:
    """Makes a fleet's authority and everything a controller needs. Raises Conflict."""
    home = Home(root)
    if root.exists() and any(root.iterdir()):
        raise Conflict(
            f"{root} is not empty; choose another directory: overwriting a CA would cut off "
            "every device that trusts it"
        )
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    authority_pair = pki.create_authority(now)
    authority = pki.Authority(authority_pair)
    server = authority.issue_server(addresses, now)
    write_public(home.config, _CONTROLLER_TOML.encode())
    write_public(home.ca, authority_pair.certificate)
    write_public(home.server, server.certificate)
    write_secret(home.server_key, server.key)
    address = f"{addresses[0]}:{FLEET_PORT}"
    write_operator(authority, home.operator, "operator", pki.OperatorRole.ADMIN, address, now)
    home.repository.mkdir()
    write_secret(home.ca_key, authority_pair.key)
    return home


def write_operator(
    authority: pki.Authority,
    directory: Path,
    name: str,
    role: pki.OperatorRole,
    address: str,
    now: datetime,
) -> None:
    """A credentials directory for one operator. Raises Conflict when it exists."""
    if directory.exists() and any(directory.iterdir()):
        raise Conflict(f"{directory} is not empty; choose another directory")
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    pair = authority.issue_operator(name, role, now)
    write_public(directory / "ca.pem", authority.pem)
    write_public(directory / "operator.pem", pair.certificate)
    write_secret(directory / "operator.key", pair.key)
    write_public(directory / "controller.toml", f'address = "{address}"\n'.encode())


def open_home(root: Path) -> Home:
    """Raises NotFound when init has not run (to its end) there."""
    home = Home(root)
    if not home.ca_key.exists():
        raise NotFound(f"{root} holds no controller; make one with `remora-controller init {root}`")
    return home


def load_toml(cls: type[T], path: Path) -> T:
    """Strictly. Raises NotFound, DocumentInvalid."""
    try:
        data = tomllib.loads(_read(path).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise DocumentInvalid(f"{path}: {e}") from e
    return parse(cls, data, str(path))


def write_public(path: Path, data: bytes) -> None:
    _write(path, data, 0o644)


def write_secret(path: Path, data: bytes) -> None:
    _write(path, data, 0o600)


def _write(path: Path, data: bytes, mode: int) -> None:
    """Never readable for others than `mode` says, not even for a moment."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as f:
        f.write(data)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise NotFound(f"{path} cannot be read: {e.strerror or e}") from e
