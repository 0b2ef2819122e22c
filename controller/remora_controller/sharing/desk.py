"""Answers devices that ask for an engine of their class, and takes in what they built.

Decisions are `tickets`'; this loads and saves them. Every change is stored before anybody hears of
it, so a restart goes on where it was. Blocks; runs on the store's thread, but for the bytes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from remora_contract.artifact import Manifest
from remora_contract.bundle import GRAPH_FILE
from remora_contract.digests import short
from remora_contract.engine import MAX_KEY_FIELDS, EngineKey, flat
from remora_contract.errors import Forbidden, NotFound, RequestInvalid
from remora_contract.strict import loads
from remora_controller.audit import AuditDraft
from remora_controller.audited import audited
from remora_controller.domain import Device, StoredEvent
from remora_controller.sharing import tickets
from remora_controller.sharing.depot import Depot, Whole, offer_name
from remora_controller.sharing.policy import Policy, scope_of, why_alone
from remora_controller.sharing.tickets import (
    Alone,
    Answer,
    Build,
    Fetch,
    Limits,
    SharedEngine,
    State,
    Ticket,
    Wait,
)
from remora_controller.store.protocol import Store
from remora_controller.store.rows import dumps
from remora_controller.store.sharing import TicketRecord

log = logging.getLogger(__name__)
MAX_KEY_BYTES = 64 << 10
MAX_TICKETS = 1000
UNROOTED_KEPT_S = 3600.0
_ASKS_PER_S = 100.0  # of all devices that wait


@dataclass(frozen=True)
class Told:
    """The answer, and for one who waits: why, and when to ask again."""

    answer: Answer
    why: str
    ask_again_s: float


@dataclass(frozen=True)
class DeskParts:
    """What the desk works with; made by the composition root."""

    store: Store
    depot: Depot
    policy: Policy
    limits: Limits
    clock: Callable[[], float]
    build_seconds: Callable[[], Mapping[str, float]]  # typical build by device model
    online: Callable[[], int]  # devices
    roots: Callable[[], frozenset[str]]  # graphs of the releases that devices are assigned


class Desk:
    def __init__(self, parts: DeskParts) -> None:
        self._parts = parts

    @property
    def policy(self) -> Policy:
        return self._parts.policy

    def claim(self, device: Device, key_json: bytes) -> Told:
        """Raises RequestInvalid, DocumentInvalid for a key that is none."""
        key = parse_key(key_json)
        scope = scope_of(self._parts.policy, device)
        if scope is None:
            return self._told(Alone(why_alone(self._parts.policy, device)), None)
        store, now = self._parts.store, self._parts.clock()
        record = store.ticket(key.digest, scope)
        if record is None and len(store.tickets()) >= MAX_TICKETS:
            return self._told(Alone(f"{MAX_TICKETS} engines are shared or being built"), None)
        record = record or TicketRecord(key, scope, Ticket(), used_at=now)
        since = store.waiting_since(key.digest, scope, device.device_id)
        ticket, answer = tickets.ask(
            self._with_bytes(record.ticket), device.device_id, now, since, self._parts.limits
        )
        self._save(record, ticket)
        self._note(record, device, since, answer, now)
        return self._told(answer, ticket)

    def _with_bytes(self, ticket: Ticket) -> Ticket:
        """A ready engine whose bytes went is not ready."""
        is_gone = ticket.engine is not None and not self._parts.depot.has(ticket.engine.digest)
        return tickets.evicted(ticket) if is_gone else ticket

    def _note(
        self, record: TicketRecord, device: Device, since: float | None, answer: Answer, now: float
    ) -> None:
        store, place = self._parts.store, (record.key.digest, record.scope, device.device_id)
        if isinstance(answer, Fetch):
            store.note_taken(*place, now)
        elif isinstance(answer, Wait) and since is None:
            store.note_waiting(*place, now)
        elif not isinstance(answer, Wait) and since is not None:
            store.forget_waiting(*place)

    def _told(self, answer: Answer, ticket: Ticket | None) -> Told:
        again = max(self._parts.limits.ask_again_s, self._parts.online() / _ASKS_PER_S)
        if isinstance(answer, Build | Alone):
            return Told(answer, answer.why, again)
        if isinstance(answer, Fetch) or ticket is None:
            return Told(answer, "", again)
        return Told(answer, self._why_wait(answer, ticket), again)

    def _why_wait(self, wait: Wait, ticket: Ticket) -> str:
        builder = self._parts.store.device(wait.builder)
        model = builder.facts.device_model if builder is not None else ""
        typical = self._parts.build_seconds().get(model)
        left = wait.left_s
        if typical is not None:
            left = min(left, max(0.0, ticket.began_at + typical - self._parts.clock()))
        what = "at most " if typical is None else ""
        return f"waiting for {wait.builder} to build, {what}{_minutes(left)} left"

    def give_up(self, device: Device, key_digest: str, blames_model: bool, why: str) -> None:
        record = self._record(device, key_digest)
        now, limits = self._parts.clock(), self._parts.limits
        ended = tickets.given_up(
            record.ticket, device.device_id, blames_model, why[: tickets.MAX_WHY], now, limits
        )
        self._save(record, ended, "engine.not_shared", device, {"reason": why[: tickets.MAX_WHY]})

    def reject(self, device: Device, key_digest: str, engine_digest: str, why: str) -> None:
        """Nobody is told to fetch it from now on, and its bytes go."""
        record = self._record(device, key_digest)
        now, limits = self._parts.clock(), self._parts.limits
        text = why[: tickets.MAX_WHY]
        ended = tickets.rejected(record.ticket, device.device_id, engine_digest, text, now, limits)
        built_by = record.ticket.engine.built_by if record.ticket.engine else ""
        detail = {"engine": engine_digest, "built_by": built_by, "reason": text}
        self._save(record, ended, "engine.rejected", device, detail)
        self.collect()

    def allow_offer(self, device: Device, key_digest: str, manifest: Manifest) -> str:
        """The offer's name in the depot; makes room there. Raises Refused, NotFound."""
        record = self._record(device, key_digest)
        tickets.check_upload(record.ticket, device.device_id, manifest.digest)
        self._save(record, self._renewed(record.ticket))
        if manifest.bytes <= self._parts.depot.max_bytes:  # what never fits evicts nobody
            self.make_room(manifest.bytes)
        return offer_name(key_digest, record.scope)

    def allow_chunk(self, device: Device, key_digest: str) -> str:
        """The offer's name. Renews the lease: bytes are progress. Raises Refused, NotFound."""
        record = self._record(device, key_digest)
        tickets.check_upload(record.ticket, device.device_id, "")
        limits, now = self._parts.limits, self._parts.clock()
        if record.ticket.lease_until - now < limits.lease_s / 2:
            self._save(record, self._renewed(record.ticket))
        return offer_name(key_digest, record.scope)

    def stored(self, device: Device, key_digest: str) -> str | None:
        """Digest of what this device uploaded before. Raises Forbidden, NotFound."""
        return tickets.stored_of(self._record(device, key_digest).ticket, device.device_id)

    def finished(self, device: Device, key_digest: str, whole: Whole, where: str) -> None:
        """Other devices run it from now on, so it is audited like a change by an operator; `where`
        is the caller's address. Raises Refused when somebody took over while it was uploaded."""
        try:
            draft = self._upload_draft(device, key_digest, whole, where)
            with audited(self._parts.store, draft, self._parts.clock):
                self._finished(device, key_digest, whole)
        finally:
            self._parts.depot.confirm(whole.manifest.digest)

    def _upload_draft(
        self, device: Device, key_digest: str, whole: Whole, where: str
    ) -> AuditDraft:
        detail = {
            "key": key_digest,
            "engine": whole.manifest.digest,
            "bytes": whole.manifest.bytes,
        }
        now, who = self._parts.clock(), device.device_id
        return AuditDraft(now, who, "device", where, "FinishEngine", dumps(detail))

    def _finished(self, device: Device, key_digest: str, whole: Whole) -> None:
        record = self._record(device, key_digest)
        now, manifest = self._parts.clock(), whole.manifest
        engine = SharedEngine(manifest.digest, manifest.bytes, device.device_id, now)
        ready = tickets.uploaded(record.ticket, device.device_id, engine)
        detail = {"engine": engine.digest, "bytes": engine.bytes}
        self._save(replace(record, used_at=now), ready, "engine.stored", device, detail)

    def remove(self, key_digest: str, site: str, by: str) -> None:
        """By an operator. Raises NotFound."""
        now = self._parts.clock()
        detail = {"key": key_digest, "site": site, "by": by}
        event = StoredEvent(now, "", "engine.removed", dumps(detail))
        if not self._parts.store.remove_ticket(key_digest, site, event):
            raise NotFound(
                f"no shared engine has the key {short(key_digest)}"
                f"{f' at site {site}' if site else ''}; see `remora engines list`"
            )
        self.collect()

    def records(self) -> list[TicketRecord]:
        return self._parts.store.tickets()

    @property
    def depot(self) -> Depot:
        return self._parts.depot

    def make_room(self, need: int) -> None:
        """Lets engines go until `need` bytes fit: those of releases that no device is assigned,
        then those that were fetched longest ago."""
        excess = self._parts.depot.stored_bytes + need - self._parts.depot.max_bytes
        if excess > 0:
            roots = self._parts.roots()
            ready = [r for r in self.records() if r.ticket.engine is not None]
            for record in sorted(ready, key=lambda r: (_graph(r.key) in roots, r.used_at)):
                if excess <= 0 or record.ticket.engine is None:
                    break
                excess -= record.ticket.engine.bytes
                detail = {"engine": record.ticket.engine.digest}
                self._save(record, tickets.evicted(record.ticket), "engine.evicted", None, detail)
        self.collect()

    def prune(self) -> None:
        """Tickets of graphs that no device is assigned, and the bytes that nobody needs, go."""
        now, roots = self._parts.clock(), self._parts.roots()
        for record in self.records():
            is_new = now - max(record.used_at, record.ticket.began_at) < UNROOTED_KEPT_S
            if record.ticket.state is State.BUILDING or is_new or _graph(record.key) in roots:
                continue
            detail = {"key": record.key.digest, "site": record.scope, "reason": "not assigned"}
            event = StoredEvent(now, "", "engine.removed", dumps(detail))
            self._parts.store.remove_ticket(record.key.digest, record.scope, event)
        self.collect()

    def collect(self) -> None:
        """Bytes that no ticket needs leave the disk."""
        records = self.records()
        engines = {r.ticket.engine.digest for r in records if r.ticket.engine is not None}
        offers = {
            offer_name(r.key.digest, r.scope) for r in records if r.ticket.state is State.BUILDING
        }
        for digest in self._parts.depot.collect(engines, offers):
            log.info("shared_engine.removed", extra={"engine": digest})

    def _record(self, device: Device, key_digest: str) -> TicketRecord:
        """Raises Forbidden where the device shares nothing, NotFound."""
        scope = scope_of(self._parts.policy, device)
        if scope is None:
            raise Forbidden(why_alone(self._parts.policy, device))
        record = self._parts.store.ticket(key_digest, scope)
        if record is None:
            raise NotFound(f"{device.device_id} has not asked for an engine of this key")
        return record

    def _renewed(self, ticket: Ticket) -> Ticket:
        return tickets.renewed(ticket, self._parts.clock(), self._parts.limits)

    def _save(
        self,
        record: TicketRecord,
        ticket: Ticket,
        event: str = "",
        device: Device | None = None,
        detail: Mapping[str, object] | None = None,
    ) -> None:
        """Nothing where nothing changed: a call that came twice."""
        if ticket == record.ticket:
            return
        events: tuple[StoredEvent, ...] = ()
        if event:
            whole = {"key": record.key.digest, "site": record.scope, **(detail or {})}
            device_id = device.device_id if device is not None else ""
            events = (StoredEvent(self._parts.clock(), device_id, event, dumps(whole)),)
            log.info(event, extra={"device": device_id, **whole})
        self._parts.store.save_ticket(replace(record, ticket=ticket), events)


def parse_key(key_json: bytes) -> EngineKey:
    """Raises RequestInvalid, DocumentInvalid."""
    if len(key_json) > MAX_KEY_BYTES:
        raise RequestInvalid(f"a build key has at most {MAX_KEY_BYTES} bytes")
    key = loads(EngineKey, key_json, "build key")
    if not key.files or not key.recipe or len(flat(key.recipe)) > MAX_KEY_FIELDS:
        raise RequestInvalid(f"a build key has files and 1 to {MAX_KEY_FIELDS} fields")
    if len(json.dumps(key.recipe)) > MAX_KEY_BYTES:
        raise RequestInvalid("a build key's recipe is too large")
    return key


def _graph(key: EngineKey) -> str:
    """Digest of the graph it was built from; "" for a key without one."""
    return next((f.digest for f in key.files if f.path == GRAPH_FILE), "")


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
