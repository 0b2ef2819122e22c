"""What sharing makes of a plan: who builds for others, who fetches, who waits. Pure.

Devices of one class, as far as they told their recipe, and of one scope share. What is ready or
being built comes first; else the first of the class in the order of the waves builds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from remora_contract.engine import Ship, Wanted, choose, offered_key
from remora_controller.domain import Device
from remora_controller.planner import Contents, DevicePlan, EnginePlan, wanted_by
from remora_controller.sharing.policy import Policy, scope_of, why_alone
from remora_controller.sharing.tickets import State
from remora_controller.store.sharing import TicketRecord


@dataclass(frozen=True)
class Sharing:
    """The fleet's policy and its tickets now."""

    policy: Policy = "off"
    records: tuple[TicketRecord, ...] = ()


@dataclass
class _Builders:
    """By scope and class: who builds in this plan, and in which wave."""

    first: dict[tuple[str, frozenset[tuple[str, str]]], DevicePlan] = field(default_factory=dict)


def shared(
    plans: Sequence[DevicePlan],
    devices: Mapping[str, Device],
    contents: Contents,
    sharing: Sharing,
) -> tuple[DevicePlan, ...]:
    """The plans, in the order of the waves, with sharing. Policy off changes nothing."""
    if sharing.policy == "off":
        return tuple(plans)
    builders = _Builders()
    return tuple(_one(p, devices[p.device_id], contents, sharing, builders) for p in plans)


def _one(
    plan: DevicePlan, device: Device, contents: Contents, sharing: Sharing, builders: _Builders
) -> DevicePlan:
    if plan.engine.what != "built" or plan.wave is None:
        return plan
    wanted = wanted_by(device.facts.engine_key, contents)
    scope = scope_of(sharing.policy, device)
    if scope is None:
        return _alone(plan, why_alone(sharing.policy, device))
    if not wanted.recipe:
        return _alone(plan, "its agent does not say which engines fit")
    found = _ticketed(scope, wanted, sharing.records)
    if found is not None:
        return _by_ticket(plan, found)
    first = builders.first.setdefault((scope, frozenset(wanted.recipe.items())), plan)
    if first is plan:
        why = f"first of its class: builds and shares; {plan.engine.why}"
        return replace(plan, engine=replace(plan.engine, why=why, shares=True))
    if first.wave == plan.wave:
        why = "one of its wave builds, whoever asks first; the others wait, then fetch"
        return _from(plan, EnginePlan("waits", why, source=first.device_id))
    why = f"built by {first.device_id} in wave {first.wave}"
    return _from(plan, EnginePlan("fetched", why, source=first.device_id))


def _ticketed(scope: str, wanted: Wanted, records: Sequence[TicketRecord]) -> TicketRecord | None:
    for record in records:
        is_live = record.ticket.state is not State.FREE
        if record.scope == scope and is_live:
            engine = offered_key(record.key.digest, record.key)
            if isinstance(choose([engine], wanted), Ship):
                return record
    return None


def _by_ticket(plan: DevicePlan, record: TicketRecord) -> DevicePlan:
    ticket = record.ticket
    if ticket.engine is not None:
        size = ticket.engine.bytes
        why = f"{size / (1 << 20):.1f} MiB, built by {ticket.engine.built_by}"
        source = ticket.engine.built_by
        engine = EnginePlan("fetched", why, ticket.engine.digest, source, size)
        return replace(_from(plan, engine), ship_bytes=plan.ship_bytes + size)
    if ticket.state is State.GIVEN_UP:
        return _alone(plan, f"{ticket.failed} attempts gave no engine to share: {ticket.why}")
    if ticket.builder == plan.device_id:
        engine = replace(plan.engine, why="it is building it, and shares", shares=True)
        return replace(plan, engine=engine)
    why = f"{ticket.builder} is building it"
    return _from(plan, EnginePlan("waits", why, source=ticket.builder))


def _from(plan: DevicePlan, engine: EnginePlan) -> DevicePlan:
    return replace(plan, engine=engine, build_s=0.0)


def _alone(plan: DevicePlan, why: str) -> DevicePlan:
    return replace(plan, engine=replace(plan.engine, why=f"alone, {why}; {plan.engine.why}"))
