"""What operators do beside releases and rollouts: groups, pins, quarantine, approvals, audit.

Runs on the store's thread, like `operations`. Knows no gRPC.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from remora_contract.device_phase import FINAL
from remora_contract.errors import Conflict, Exhausted, Forbidden, NotFound, Refused, RequestInvalid
from remora_controller import groups as grouping
from remora_controller.audit import AuditEntry, AuditHead, check_chain
from remora_controller.domain import Device, StoredEvent
from remora_controller.groups import Group
from remora_controller.operations import Operations
from remora_controller.selector import parse_selector
from remora_controller.store.protocol import Store
from remora_controller.store.rows import dumps
from remora_controller.transitions import Request, requested

MAX_REASON = 500
MAX_AUDIT_PAGE = 1000


class Governance:
    def __init__(self, store: Store, operations: Operations, clock: Callable[[], float]) -> None:
        self._store = store
        self._operations = operations
        self._clock = clock

    # -- groups ----------------------------------------------------------------------------

    def groups(self) -> list[tuple[Group, int]]:
        """With how many devices are in each now."""
        devices = self._store.devices()
        known = self._store.groups()
        found = []
        for group in known.values():
            selector = grouping.bind_live(f"group={group.name}", known)
            inside = sum(selector.matches(d.device_id, d.labels) for d in devices)
            found.append((group, inside))
        return found

    def save_group(
        self, name: str, device_ids: Sequence[str], selector: str, *, replace: bool, by: str
    ) -> tuple[Group, int]:
        """Raises Conflict when it is there, RequestInvalid, NotFound, Exhausted."""
        known = self._store.groups()
        if name in known and not replace:
            raise Conflict(f"there is a group {name} already; change it with --replace")
        if name not in known and len(known) >= grouping.MAX_GROUPS:
            raise Exhausted(f"a fleet has at most {grouping.MAX_GROUPS} groups; delete one")
        ids = [d.device_id for d in self._store.devices()]
        group = grouping.make_group(name, device_ids, selector, self._clock(), by, ids)
        grouping.bind(parse_selector(f"group={name}"), {**known, name: group})
        self._store.save_group(group)
        return next(g for g in self.groups() if g[0].name == name)

    def delete_group(self, name: str) -> None:
        """Raises NotFound, Refused while a group or an open rollout names it."""
        known = self._store.groups()
        if name not in known:
            raise NotFound(f"no group {name}; `remora groups list` shows those there are")
        users = [f"group {g}" for g in grouping.users_of(name, known.values())]
        users += [
            f"rollout {r.rollout_id}"
            for r in self._store.open_rollouts()
            if name in grouping.names_in(r.selector)
        ]
        if users:
            raise Refused(f"group {name} is in use by {', '.join(users[:5])}; change those first")
        self._store.delete_group(name)

    # -- devices ---------------------------------------------------------------------------

    def pin(self, device_id: str, reason: str, by: str) -> Device:
        """It keeps what it runs, whatever rollouts do. Raises NotFound, Refused while it changes,
        RequestInvalid."""
        self._operations.device(device_id)
        newest = self._store.assignment(device_id)
        if newest is not None and newest.phase not in FINAL:
            phase = newest.phase.value if newest.phase else "not answered yet"
            raise Refused(
                f"device {device_id} is changing ({phase}): pin it when it has settled, or abort "
                f"rollout {newest.rollout_id} first"
            )
        self._store.set_pin(device_id, f"{_reason(reason)} (by {by})".strip())
        return self._operations.device(device_id)

    def unpin(self, device_id: str) -> Device:
        """Raises NotFound."""
        if self._operations.device(device_id).pin is None:
            raise NotFound(f"device {device_id} is not pinned")
        self._store.set_pin(device_id, None)
        return self._operations.device(device_id)

    def quarantine(self, device_id: str, reason: str, by: str) -> Device:
        """It serves on, and is assigned nothing. Raises NotFound, RequestInvalid."""
        self._operations.device(device_id)
        why = _reason(reason) or "by an operator"
        self._store.quarantine_by(device_id, by, why, self._clock())
        return self._operations.device(device_id)

    def lift_quarantine(self, device_id: str) -> Device:
        """Raises NotFound, Refused for a clone: that only joining again heals."""
        device = self._operations.device(device_id)
        if device.quarantine is None:
            raise NotFound(f"device {device_id} is not quarantined")
        if not device.quarantined_by:
            raise Refused(
                f"the identity of device {device_id} is used by two machines "
                f"({device.quarantine}): remove it and join each with a token of its own"
            )
        self._store.lift_quarantine(device_id, self._clock())
        return self._operations.device(device_id)

    # -- approvals -------------------------------------------------------------------------

    def approve(self, rollout_id: str, by: str) -> None:
        """Raises NotFound, Refused in another state, Forbidden for its author, Conflict."""
        record = self._store.rollout(rollout_id)
        if record is None:
            raise NotFound(f"no rollout {rollout_id}; see `remora rollout list`")
        requested(record.state, Request.APPROVE, rollout_id)
        if record.created_by == by:
            raise Forbidden(f"{by} started rollout {rollout_id}: somebody else has to approve it")
        if not self._store.approve(record, by, self._clock()):
            raise Conflict(f"rollout {rollout_id} changed meanwhile; look at it and try again")
        detail = {"rollout": rollout_id, "release": record.release_id, "by": by}
        event = StoredEvent(self._clock(), "", "rollout.approve", dumps(detail))
        self._store.add_events([event])

    def history(self, rollout_id: str, limit: int) -> list[StoredEvent]:
        """What happened to one rollout, oldest first. Raises NotFound."""
        self._operations.rollout(rollout_id)
        return self._store.rollout_events(rollout_id, limit)

    # -- audit -----------------------------------------------------------------------------

    def audit(
        self, since: float, after_seq: int, limit: int
    ) -> tuple[list[AuditEntry], AuditHead, str]:
        """A page, the head, and what is wrong with the chain: it is followed as a whole with the
        first page."""
        wanted = min(limit or MAX_AUDIT_PAGE, MAX_AUDIT_PAGE)
        head = self._store.audit_head()
        broken = None if after_seq else check_chain(self._store.audit_entries(), head)
        return self._store.audit(since, after_seq, wanted), head, broken or ""


def _reason(text: str) -> str:
    if len(text) > MAX_REASON:
        raise RequestInvalid(f"a reason has at most {MAX_REASON} characters, not {len(text)}")
    return text
