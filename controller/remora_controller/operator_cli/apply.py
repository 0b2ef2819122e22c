"""`remora apply`: brings a fleet to what files say; the same files again change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from remora_contract.digests import canonical_json
from remora_contract.errors import DocumentInvalid, NotFound, RequestInvalid, UsageWrong
from remora_contract.release import Release
from remora_contract.strict import loads
from remora_controller.gates.syntax import parse_check
from remora_controller.operator_cli import render
from remora_controller.operator_cli.fleet_file import (
    FleetFile,
    WantedGroup,
    WantedRollout,
    merged,
    read_fleet_file,
)
from remora_controller.operator_cli.gate_options import add_to
from remora_controller.operator_cli.release_document import to_release
from remora_controller.operator_cli.releases import create_release, list_artifacts
from remora_controller.operator_cli.session import Session, connect
from remora_controller.operator_cli.spec_options import spec_message
from remora_controller.release_diff import release_differences
from remora_protos.operator.v1 import operator_pb2 as pb

CHANGED = 3
MAX_FILES = 256
MAX_FILE_BYTES = 256 << 10


@dataclass(frozen=True)
class Change:
    """One call that has to be made, and how it reads."""

    what: str  # "group canary"
    before: str  # "" where there is nothing yet
    after: str
    make: Callable[[], object]
    said: str = ""  # for people, in place of before and after


def register(root: typer.Typer) -> None:
    root.command()(apply)


def apply(
    context: typer.Context,
    file: Annotated[
        Path,
        typer.Option("--file", "-f", help="A fleet file (YAML), or a folder of them."),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would change, and change nothing.")
    ] = False,
    as_json: render.Json = None,
) -> None:
    """Bring groups, releases, labels, pins and rollouts to what files say. What they do not name is
    left alone. Exit code 0: nothing had to change; 3: something did (with --dry-run: would)."""
    wanted = merged((str(p), read_fleet_file(_read(p), str(p))) for p in _files(file))
    for name, rollout in wanted.rollouts.items():
        _start(name, rollout, rollout.release)  # before anything is changed
    session = connect(context)
    # Once, and whole: whatever cannot be found is refused before anything is changed.
    planned = list(changes(session, wanted))
    shown = []
    for change in planned:
        shown.append({"what": change.what, "before": change.before, "after": change.after})
        if not dry_run:
            change.make()
        if as_json is None:
            before = f"{change.before} -> " if change.before else ""
            render.console().print(f"{change.what}: {change.said or before + change.after}")
    if as_json is not None:
        render.print_data(shown, as_json)
    elif not shown:
        render.console().print("nothing to change")
    if shown:
        raise typer.Exit(CHANGED)


def changes(session: Session, wanted: FleetFile) -> Iterator[Change]:
    """In the order in which they have to be made, so that rollouts see the labels and groups they
    need. Changes nothing."""
    yield from _label_changes(session, wanted)
    yield from _group_changes(session, wanted.groups)
    yield from _pin_changes(session, wanted)
    published = list_artifacts(session) if wanted.releases else []
    releases = {name: to_release(file, published) for name, file in wanted.releases.items()}
    yield from _release_changes(session, releases.values())
    ids = {name: release.release_id for name, release in releases.items()}
    yield from _rollout_changes(session, wanted.rollouts, ids)


def _release_changes(session: Session, releases: Iterable[Release]) -> Iterator[Change]:
    found = _releases(session)
    for release in releases:
        if any(r.release_id == release.release_id for r in found):
            continue
        older = next((r for r in found if r.name == release.name), None)  # newest first
        yield Change(
            f"release {release.release_id}",
            older.release_id if older is not None else "",
            canonical_json(release).decode(),
            lambda r=release: create_release(session, r),  # type: ignore[misc]
            "new" if older is None else _differing(older, release),
        )


def _differing(older: pb.ReleaseInfo, release: Release) -> str:
    before = loads(Release, older.release_json, older.release_id)
    lines = [
        f"  {d.path}: {d.before or 'nothing'} -> {d.after or 'nothing'}"
        for d in release_differences(before, release, {})
    ]
    return "\n".join([f"after {older.release_id}", *lines])


def _label_changes(session: Session, wanted: FleetFile) -> Iterator[Change]:
    devices = _devices(session) if wanted.labels else {}
    for device_id, labels in wanted.labels.items():
        device = _known(devices, device_id)
        differing = {k: v for k, v in labels.items() if device.labels.get(k) != v}
        if differing:
            request = pb.LabelDeviceRequest(
                device_id=device_id,
                set={k: v for k, v in differing.items() if v is not None},
                remove=[k for k, v in differing.items() if v is None],
            )
            before = {k: device.labels[k] for k in differing if k in device.labels}
            after = [f"{k}={v}" if v is not None else f"{k}-" for k, v in differing.items()]
            yield Change(
                f"labels of {device_id}",
                render.labels_text(before),
                ",".join(after),
                _call(session, session.stub.LabelDevice, request),
            )


def _group_changes(session: Session, wanted: dict[str, WantedGroup]) -> Iterator[Change]:
    found = session.call(session.stub.ListGroups, pb.ListGroupsRequest()).groups if wanted else ()
    known = {g.name: g for g in found}
    for name, group in wanted.items():
        request = pb.SaveGroupRequest(
            name=name,
            device_ids=sorted(set(group.devices or ())),
            selector=group.selector or "",
            replace=name in known,
        )
        before, after = _holds(known.get(name)), _holds(request)
        if before != after:
            call = _call(session, session.stub.SaveGroup, request)
            yield Change(f"group {name}", before, after, call)


def _holds(group: Any) -> str:
    if group is None:
        return ""
    return group.selector or f"devices {', '.join(group.device_ids)}".strip()


def _pin_changes(session: Session, wanted: FleetFile) -> Iterator[Change]:
    """A pin that is there stays, whatever its reason: who said so must not be lost."""
    devices = _devices(session) if wanted.pins else {}
    for device_id, reason in wanted.pins.items():
        pin = _known(devices, device_id).pin
        if bool(pin) == (reason is not None):
            continue
        request = pb.PinDeviceRequest(
            device_id=device_id, unpin=reason is None, reason=reason or ""
        )
        after = "not pinned" if reason is None else f"pinned: {reason}"
        call = _call(session, session.stub.PinDevice, request)
        yield Change(f"pin of {device_id}", pin, after, call)


def _rollout_changes(
    session: Session, wanted: dict[str, WantedRollout], ids: dict[str, str]
) -> Iterator[Change]:
    """The newest rollout of a selector says what its devices should run. One of the same release
    counts however it ended: what went back by itself is not started again by repeating."""
    request = pb.ListRolloutsRequest()
    rollouts = session.call(session.stub.ListRollouts, request).rollouts if wanted else ()
    releases = {r.release_id for r in _releases(session)} if wanted else set()
    for name, rollout in wanted.items():
        release_id = ids.get(rollout.release, rollout.release)
        if release_id not in {*releases, *ids.values()}:
            raise NotFound(f"rollouts.{name}: no release {release_id} in the files or the fleet")
        newest = next((r for r in rollouts if r.selector == rollout.selector), None)
        if newest is not None and newest.release_id == release_id:
            continue
        before = f"{newest.release_id} ({newest.state})" if newest else ""
        call = _call(session, session.stub.StartRollout, _start(name, rollout, release_id))
        yield Change(f"rollout {name}", before, release_id, call)


def _start(name: str, rollout: WantedRollout, release_id: str) -> pb.StartRolloutRequest:
    """Raises DocumentInvalid for what cannot be read."""
    try:
        spec = spec_message(
            list(rollout.waves),
            rollout.soak_s,
            rollout.success_threshold,
            rollout.wave_timeout_s,
            rollout.max_unavailable,
        )
        for gate in rollout.gates:
            parse_check(gate.check)
        schedule = (rollout.not_before, rollout.windows)
        limits = (rollout.device_bandwidth, rollout.bandwidth)
        add_to(spec, rollout.gates, rollout.stratify, *schedule, *limits)
    except (UsageWrong, RequestInvalid) as e:
        raise DocumentInvalid(f"rollouts.{name}: {e}") from e
    return pb.StartRolloutRequest(
        release=release_id,
        selector=rollout.selector,
        spec=spec,
        skip_refused=rollout.skip_refused,
        supersede=rollout.supersede,
        needs_approval=rollout.needs_approval,
    )


def _call(session: Session, method: Callable[..., Any], request: object) -> Callable[[], object]:
    return lambda: session.call(method, request)


def _devices(session: Session) -> dict[str, pb.Device]:
    found = session.call(session.stub.ListDevices, pb.ListDevicesRequest()).devices
    return {d.device_id: d for d in found if d.status != "removed"}


def _known(devices: dict[str, pb.Device], device_id: str) -> pb.Device:
    if device_id not in devices:
        raise NotFound(f"no device {device_id}; `remora devices` lists those there are")
    return devices[device_id]


def _releases(session: Session) -> list[pb.ReleaseInfo]:
    return list(session.call(session.stub.ListReleases, pb.ListReleasesRequest()).releases)


def _files(path: Path) -> list[Path]:
    """Raises NotFound, DocumentInvalid for too many."""
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.iterdir() if p.suffix in (".yaml", ".yml"))
    if not found:
        raise NotFound(f"{path} holds no .yaml file")
    if len(found) > MAX_FILES:
        raise DocumentInvalid(f"{path} holds more than {MAX_FILES} files")
    return found


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as f:
            return f.read(MAX_FILE_BYTES + 1)  # one more than load_yaml takes: it refuses
    except OSError as e:
        raise NotFound(f"{path} cannot be read: {e.strerror or e}") from e
