"""What operators do: tokens, labels, releases, plans, rollouts. Decisions are asked from the pure
modules; this loads what they need and stores what they say.

Runs on the store's thread. Knows no gRPC.
"""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from remora_contract.digests import canonical_json
from remora_contract.errors import Conflict, Incompatible, NotFound, Refused, RequestInvalid
from remora_contract.gates import merged
from remora_contract.join_token import JoinToken
from remora_contract.release import Release
from remora_contract.release_rules import document_refusals, unknown_backends
from remora_contract.strict import loads
from remora_controller.build_history import build_seconds
from remora_controller.domain import (
    Device,
    Member,
    ReleaseRecord,
    RolloutRecord,
    RolloutSpec,
    RolloutState,
    StoredEvent,
)
from remora_controller.driver import load_view
from remora_controller.experiments.rules import check_rules
from remora_controller.gates.judge import parsed
from remora_controller.gates.watch import GateWatch
from remora_controller.groups import bind
from remora_controller.labels import check_labels
from remora_controller.planner import Contents, DevicePlan, Plan, make_plan, release_refusals
from remora_controller.presence import Presence
from remora_controller.release_diff import Difference, release_differences
from remora_controller.repository import Repository
from remora_controller.rollout import RolloutView
from remora_controller.selector import Selector, parse_selector
from remora_controller.sharing.forecast import Sharing, shared
from remora_controller.sharing.policy import Policy
from remora_controller.store.protocol import JoinTokenRecord, MemberState, Store
from remora_controller.store.rows import dumps
from remora_controller.transitions import Request, requested
from remora_controller.waves import bucket

log = logging.getLogger(__name__)
MAX_TOKEN_LIFE_S = 30 * 24 * 3600.0
_SHOWN_REFUSALS = 5
_CAS_ATTEMPTS = 8


@dataclass(frozen=True)
class RolloutDetail:
    record: RolloutRecord
    release_name: str
    view: RolloutView
    states: tuple[MemberState, ...]


@dataclass(frozen=True)
class StartRequest:
    release: str
    selector: str
    spec: RolloutSpec
    skip_refused: bool = False
    supersede: bool = False
    needs_approval: bool = False
    retry_of: str | None = None
    attempt: int = 1


class Operations:
    def __init__(
        self,
        store: Store,
        repository: Repository,
        presence: Presence,
        clock: Callable[[], float],
        random_bytes: Callable[[int], bytes],
        always_approve: bool = False,
        sharing: Policy = "off",
    ) -> None:
        """`always_approve`: no rollout begins before somebody else than its author approved."""
        self._store = store
        self._repository = repository
        self._presence = presence
        self._clock = clock
        self._random_bytes = random_bytes
        self._gates = GateWatch(presence.samples)
        self._always_approve = always_approve
        self.sharing = sharing

    # -- devices ---------------------------------------------------------------------------

    def create_token(
        self, labels: Mapping[str, str], valid_for_s: float, ca_sha256: str, by: str
    ) -> tuple[JoinToken, float]:
        """The token and when it expires. Raises RequestInvalid."""
        if not 0 < valid_for_s <= MAX_TOKEN_LIFE_S:
            raise RequestInvalid("a join token is valid for more than 0 seconds, at most 30 days")
        check_labels(labels)
        secret = base64.urlsafe_b64encode(self._random_bytes(32)).decode().rstrip("=")
        now = self._clock()
        record = JoinTokenRecord(
            secret_hash(secret), dict(labels), now, now + valid_for_s, created_by=by
        )
        self._store.add_join_token(record)
        return JoinToken(secret, ca_sha256), record.expires_at

    def devices(self, selector: str) -> list[Device]:
        """Raises RequestInvalid for a selector that cannot be read."""
        wanted = self._selector(selector)
        return [d for d in self._store.devices() if wanted.matches(d.device_id, d.labels)]

    def _selector(self, text: str) -> Selector:
        """Raises RequestInvalid, NotFound for a group that is not there."""
        return bind(parse_selector(text), self._store.groups())

    def removed(self, selector: str, device_ids: Iterable[str]) -> list[Device]:
        """Those of the removed devices that match."""
        wanted = self._selector(selector)
        found = [self._store.device(d) for d in sorted(device_ids)]
        removed = [d for d in found if d is not None and d.removed_at is not None]
        return [d for d in removed if wanted.matches(d.device_id, d.labels)]

    def device(self, device_id: str) -> Device:
        """Raises NotFound."""
        found = self._store.device(device_id)
        if found is None or found.removed_at is not None:
            raise NotFound(f"no device {device_id}; `remora devices` lists those there are")
        return found

    def label(self, device_id: str, set_: Mapping[str, str], remove: list[str]) -> Device:
        """Raises NotFound, RequestInvalid, Refused for a label the device itself sets."""
        device = self.device(device_id)
        labels = {**device.operator_labels, **set_}
        for key in remove:
            if key not in labels and key in device.device_labels:
                raise Refused(
                    f"label {key} comes from the agent.toml of {device_id}; change it there"
                )
            if labels.pop(key, None) is None:
                raise NotFound(f"device {device_id} has no label {key}")
        check_labels(labels)
        self._store.set_operator_labels(device_id, labels)
        return self.device(device_id)

    def remove_device(self, device_id: str) -> None:
        """For good. Raises NotFound."""
        self.device(device_id)
        self._store.remove_device(device_id, self._clock())
        self._presence.forget(device_id)
        log.info("device.removed", extra={"device": device_id})

    def events(self, device_id: str | None, limit: int) -> list[StoredEvent]:
        """Newest first; also of removed devices. Raises NotFound for one that never was."""
        if device_id is not None and self._store.device(device_id) is None:
            raise NotFound(f"no device {device_id}; `remora devices` lists those there are")
        return self._store.events(device_id, limit)

    # -- releases --------------------------------------------------------------------------

    def create_release(self, document: bytes, by: str) -> ReleaseRecord:
        """Raises DocumentInvalid, RequestInvalid (the check of a gate or of an experiment's rule
        cannot be read), NotFound (an artifact is not published), Incompatible."""
        release = loads(Release, document, "release")
        self.checked_contents(release)
        record = ReleaseRecord(
            release.release_id, release.name, canonical_json(release), self._clock(), by
        )
        return self._store.add_release(record)

    def checked_contents(self, release: Release) -> Contents:
        """Of a release that may not be stored yet. Raises what `create_release` raises."""
        for gate in release.gates.checks if release.gates else ():
            parsed(gate.check)
        check_rules(release.experiments or ())
        contents = self._contents(release)
        refusals = [
            *document_refusals(release),
            *unknown_backends(release.constraints),
            *release_refusals(contents),
        ]
        if refusals:
            raise Incompatible(refusals)
        return contents

    def release(self, name_or_id: str) -> ReleaseRecord:
        """Raises NotFound."""
        found = self._store.release(name_or_id)
        if found is None:
            raise NotFound(
                f"no release {name_or_id}; make one with `remora releases create`, or see "
                "`remora releases list`"
            )
        return found

    def differences(self, before: str, after: str) -> list[Difference]:
        """Between two releases, by id or name. Raises NotFound."""
        records = map(self.release, (before, after))
        old, new = (loads(Release, r.document, r.release_id) for r in records)
        return self.differences_of(old, new)

    def differences_of(self, before: Release, after: Release) -> list[Difference]:
        return release_differences(before, after, self._repository.index().manifests)

    def contents_of(self, release_id: str) -> Contents:
        """Raises NotFound when an artifact is not (or no longer) published."""
        return self._contents(loads(Release, self.release(release_id).document, release_id))

    def _contents(self, release: Release) -> Contents:
        index = self._repository.index()
        if any(d not in index.manifests for d in release.all_digests()):
            index = self._repository.index(is_fresh=True)
        for digest in release.all_digests():
            index.manifest(digest)
        return Contents(release, index.manifests)

    # -- rollouts --------------------------------------------------------------------------

    def plan(self, release: str, selector: str, spec: RolloutSpec) -> Plan:
        """Raises NotFound, RequestInvalid; Refused when no device matches."""
        return self.plan_of(self.contents_of(release), selector, spec)

    def plan_document(self, document: bytes, selector: str, spec: RolloutSpec) -> Plan:
        """Of a release that may not be stored. Raises what `create_release` and `plan` raise."""
        contents = self.checked_contents(loads(Release, document, "release"))
        return self.plan_of(contents, selector, spec)

    def plan_of(self, contents: Contents, selector: str, spec: RolloutSpec) -> Plan:
        """Raises RequestInvalid; Refused when no device matches."""
        devices = self.devices(selector)
        if not devices:
            raise Refused(
                f"no device matches {selector!r}; `remora devices` shows their labels"
                if selector
                else "no device has joined yet; make a token with `remora devices token`"
            )
        online = self._presence.online(self._clock())
        seconds = build_seconds(self._store)
        plan = make_plan(devices, online, contents, seconds, spec.waves, spec.stratify)
        now = Sharing(self.sharing, tuple(self._store.tickets()))
        by_id = {d.device_id: d for d in devices}
        return replace(plan, devices=shared(plan.devices, by_id, contents, now))

    def start(self, request: StartRequest, by: str) -> RolloutDetail:
        """Raises NotFound, RequestInvalid, Refused (the plan refuses devices), Conflict."""
        release = self.release(request.release)
        spec = self._whole_spec(request.spec, release)
        plan = self.plan(release.release_id, request.selector, request.spec)
        refused = tuple(d for d in plan.refused if not d.is_pinned)
        if refused and not request.skip_refused:
            raise Refused(_refused_message(refused))
        members = [
            Member(d.device_id, d.wave, bucket=bucket(d.device_id))
            for d in plan.devices
            if d.wave is not None
        ]
        if not members:
            raise Refused(_refused_message(plan.refused))
        now = self._clock()
        waits = request.needs_approval or self._always_approve
        record = RolloutRecord(
            rollout_id=f"r-{self._random_bytes(4).hex()}",
            release_id=release.release_id,
            selector=request.selector,
            spec=spec,
            waves=len(plan.waves),
            created_at=now,
            created_by=by,
            clock_at=now,
            reason=f"{len(plan.refused)} devices left out by the plan" if plan.refused else "",
            retry_of=request.retry_of,
            attempt=request.attempt,
            state=RolloutState.AWAITING_APPROVAL if waits else RolloutState.RUNNING,
            needs_approval=waits,
        )
        superseded = self._store.add_rollout(record, members, supersede=request.supersede)
        self._tell(record, "started", by, {"superseded": superseded})
        return self.rollout(record.rollout_id)

    def _whole_spec(self, spec: RolloutSpec, release: ReleaseRecord) -> RolloutSpec:
        """With the release's gates and windows, where the rollout does not say otherwise. Raises
        RequestInvalid for a check that cannot be read."""
        document = loads(Release, release.document, release.release_id)
        own = document.gates.checks if document.gates else ()
        try:
            gates = merged(own, spec.gates)
        except ValueError as e:
            raise RequestInvalid(f"gates of release and rollout together: {e}") from e
        for gate in gates:
            parsed(gate.check)
        return replace(spec, gates=gates, windows=spec.windows or document.windows or ())

    def retry(
        self, rollout_id: str, by: str, *, skip_refused: bool, supersede: bool
    ) -> RolloutDetail:
        """A new attempt at an ended rollout. Raises what `start` raises; Refused while it is open
        and when it completed."""
        record = self._record(rollout_id)
        if not record.state.is_final:
            raise Refused(f"rollout {rollout_id} is {record.state.value}: wait for it, or abort it")
        if record.state is RolloutState.COMPLETED:
            raise Refused(
                f"rollout {rollout_id} completed: devices that missed it get it when they return"
            )
        request = StartRequest(
            record.release_id,
            record.selector,
            replace(record.spec, not_before=None),
            skip_refused,
            supersede,
            needs_approval=record.needs_approval,  # a retry is no way around it
            retry_of=rollout_id,
            attempt=record.attempt + 1,
        )
        return self.start(request, by)

    def rollout(self, rollout_id: str) -> RolloutDetail:
        """Raises NotFound."""
        record = self._record(rollout_id)
        now = self._clock()
        view = load_view(self._store, self._presence, record, now)
        if not record.state.is_final:
            view = self._gates.judged(self._store, view, now)
        states = self._store.member_states(rollout_id)
        release = self._store.release(record.release_id)
        return RolloutDetail(record, release.name if release else "", view, tuple(states))

    def request(
        self,
        rollout_id: str,
        request: Request,
        by: str,
        *,
        keep: bool = False,
        accept_gates: bool = False,
    ) -> None:
        """Pause, resume or abort. `accept_gates`: goes on although gates of the waves so far do
        not pass. Raises NotFound, Refused (not possible in its state)."""
        for _ in range(_CAS_ATTEMPTS):
            record = self._record(rollout_id)
            state = requested(record.state, request, rollout_id)
            reason = f"{request.value} by {by}"
            accepted = record.wave if accept_gates else None
            if accept_gates:
                reason += f", accepting waves 1 to {record.wave} whatever their gates say"
            if record.state is RolloutState.ROLLING_BACK:
                reason = f"{record.reason}; {reason}"
            if self._store.set_state(record, state, reason, keep, self._clock(), accepted):
                self._tell(record, request.value, by, {"keep": keep, "accept_gates": accept_gates})
                return
        raise Conflict(f"rollout {rollout_id} keeps changing; try again")

    def _record(self, rollout_id: str) -> RolloutRecord:
        record = self._store.rollout(rollout_id)
        if record is None:
            raise NotFound(f"no rollout {rollout_id}; see `remora rollout list`")
        return record

    def _tell(self, record: RolloutRecord, what: str, by: str, detail: dict[str, object]) -> None:
        whole = {
            "rollout": record.rollout_id,
            "release": record.release_id,
            "by": by,
            **detail,
        }
        log.info(f"rollout.{what}", extra=whole)
        self._store.add_events([StoredEvent(self._clock(), "", f"rollout.{what}", dumps(whole))])


def secret_hash(secret: str) -> str:
    """Secrets are random and long: a plain hash is enough to store."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _refused_message(refused: tuple[DevicePlan, ...]) -> str:
    shown = [
        f"{d.device_id} ({'; '.join(map(str, d.refusals))})" for d in refused[:_SHOWN_REFUSALS]
    ]
    more = len(refused) - len(shown)
    return (
        f"{len(refused)} devices cannot take this release: {', '.join(shown)}"
        f"{f' and {more} more' if more else ''}; see `remora plan`, or leave them out with "
        "--skip-refused"
    )
