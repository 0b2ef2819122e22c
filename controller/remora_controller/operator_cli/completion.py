"""What the shell offers behind Tab: ids and names that the controller knows. Nothing where it
cannot be asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import typer

from remora_contract.errors import RemoraError
from remora_controller.operator_cli.session import Session, completing
from remora_protos.operator.v1 import operator_pb2 as pb

MAX_OFFERED = 200
Ask = Callable[[Session], Iterable[str]]


def devices(context: typer.Context, incomplete: str) -> list[str]:
    return _offered(context, incomplete, _devices)


def rollouts(context: typer.Context, incomplete: str) -> list[str]:
    return _offered(context, incomplete, _rollouts)


def releases(context: typer.Context, incomplete: str) -> list[str]:
    return _offered(context, incomplete, _releases)


def groups(context: typer.Context, incomplete: str) -> list[str]:
    return _offered(context, incomplete, _groups)


def experiments(context: typer.Context, incomplete: str) -> list[str]:
    return _offered(context, incomplete, _experiments)


def _offered(context: typer.Context, incomplete: str, ask: Ask) -> list[str]:
    session = completing(context)
    if session is None:
        return []
    try:
        names = ask(session)
    except RemoraError:
        return []  # a completion has nowhere to say what is wrong
    return [n for n in dict.fromkeys(names) if n.startswith(incomplete)][:MAX_OFFERED]


def _devices(session: Session) -> Iterable[str]:
    found = session.call(session.stub.ListDevices, pb.ListDevicesRequest()).devices
    return [d.device_id for d in found]


def _rollouts(session: Session) -> Iterable[str]:
    found = session.call(session.stub.ListRollouts, pb.ListRolloutsRequest()).rollouts
    return [r.rollout_id for r in found]


def _releases(session: Session) -> Iterable[str]:
    found = session.call(session.stub.ListReleases, pb.ListReleasesRequest()).releases
    return [*(r.name for r in found), *(r.release_id for r in found)]


def _groups(session: Session) -> Iterable[str]:
    found = session.call(session.stub.ListGroups, pb.ListGroupsRequest()).groups
    return [g.name for g in found]


def _experiments(session: Session) -> Iterable[str]:
    request = pb.ListExperimentsRequest()
    found = session.call(session.stub.ListExperiments, request).experiments
    return [e.name for e in found]
