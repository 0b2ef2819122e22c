"""A fleet as people write it: groups, releases, labels, pins and rollouts in YAML files. Pure.

What a file does not name is left alone. Several files count as one; no entry may be in two.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from remora_contract.errors import DocumentInvalid
from remora_contract.gates import Gate
from remora_contract.strict import parse
from remora_contract.yaml_text import load_yaml
from remora_controller.operator_cli.release_document import ReleaseFile, parse_release_table


@dataclass(frozen=True)
class WantedGroup:
    """Static or dynamic."""

    devices: tuple[str, ...] | None = None
    selector: str | None = None

    def __post_init__(self) -> None:
        if (self.devices is None) == (self.selector is None):
            raise ValueError("a group has either devices or a selector")


@dataclass(frozen=True)
class WantedRollout:
    """The release that the devices of a selector should run, and how they get there."""

    release: str  # a name among `releases`, or an id
    selector: str = ""
    waves: tuple[str, ...] = ()  # as for --wave: "1", "25%"
    soak_s: float = 60.0
    success_threshold: float = 1.0
    wave_timeout_s: float | None = None
    max_unavailable: int = 0
    needs_approval: bool = False
    skip_refused: bool = False
    gates: tuple[Gate, ...] = ()  # beside the release's own
    stratify: tuple[str, ...] = ()
    not_before: str | None = None
    windows: tuple[str, ...] = ()
    device_bandwidth: str | None = None  # "500K"
    bandwidth: str | None = None  # "50M", of all devices together
    supersede: bool = False


@dataclass(frozen=True)
class FleetFile:
    groups: dict[str, WantedGroup] = field(default_factory=dict)
    releases: dict[str, ReleaseFile] = field(default_factory=dict)  # by name
    labels: dict[str, dict[str, str | None]] = field(default_factory=dict)  # null takes one away
    pins: dict[str, str | None] = field(default_factory=dict)  # device -> reason; null unpins
    rollouts: dict[str, WantedRollout] = field(default_factory=dict)  # by a name of one's own


def read_fleet_file(data: bytes, where: str) -> FleetFile:
    """Strict YAML. Raises DocumentInvalid naming the key."""
    table = load_yaml(data, where)
    if not isinstance(table, dict):
        raise DocumentInvalid(f"{where}: a table of groups, releases, labels, pins, rollouts")
    releases = table.get("releases", {})
    if not isinstance(releases, dict):
        raise DocumentInvalid(f"{where}: releases must be a table of releases by name")
    read = {name: _release(name, entry, where) for name, entry in releases.items()}
    rest: FleetFile = parse(FleetFile, {**table, "releases": {}}, where)
    return FleetFile(rest.groups, read, rest.labels, rest.pins, rest.rollouts)


def merged(files: Iterable[tuple[str, FleetFile]]) -> FleetFile:
    """All as one. Raises DocumentInvalid for an entry that is in two files."""
    whole: dict[str, dict[str, Any]] = {f.name: {} for f in fields(FleetFile)}
    for where, file in files:
        for part, known in whole.items():
            for name, entry in getattr(file, part).items():
                if name in known:
                    raise DocumentInvalid(f"{where}: {part}.{name} is in another file too")
                known[name] = entry
    return FleetFile(**whole)


def _release(name: str, entry: object, where: str) -> ReleaseFile:
    if not isinstance(entry, dict):
        raise DocumentInvalid(f"{where}: releases.{name} must be a table")
    return parse_release_table({**entry, "name": name}, f"{where}: releases.{name}")
