"""Shipping an adapter: the release that devices run, with one adapter changed."""

from __future__ import annotations

from collections.abc import Mapping

from remora_contract.errors import Refused
from remora_contract.release import Release
from remora_controller.operator_cli.release_document import derive
from remora_controller.operator_cli.releases import (
    create_release,
    find_release,
    list_artifacts,
    release_of,
)
from remora_controller.operator_cli.session import Session
from remora_protos.operator.v1 import operator_pb2 as pb


def ship_release(
    session: Session, adapters: Mapping[str, str], selector: str, base: str | None
) -> str:
    """Makes the derived release; its id. Raises as `derived` does."""
    return create_release(session, derived(session, adapters, selector, base)).release_id


def derived(
    session: Session, adapters: Mapping[str, str], selector: str, base: str | None
) -> Release:
    """What the devices run, or `base`, with these adapters changed; not made yet. Raises Refused
    when the devices run different releases."""
    base_id = base or common_release(session, selector)
    return derive(release_of(find_release(session, base_id)), adapters, list_artifacts(session))


def common_release(session: Session, selector: str) -> str:
    """The one release that all matching devices run or were last assigned. Raises Refused."""
    request = pb.ListDevicesRequest(selector=selector)
    devices = session.call(session.stub.ListDevices, request).devices
    running: dict[str, list[str]] = {}
    for device in devices:
        release = device.running_release_id or device.assigned_release_id
        running.setdefault(release, []).append(device.device_id)
    running.pop("", None)
    if not running:
        raise Refused(
            "no matching device runs a release yet; start one with `remora rollout start`"
        )
    if len(running) > 1:
        groups = "; ".join(f"{r}: {len(d)} devices" for r, d in sorted(running.items()))
        raise Refused(
            f"the matching devices run different releases ({groups}); narrow --selector, or say "
            "--from RELEASE"
        )
    return next(iter(running))
