"""Which adapters this device knows: names, revisions, aliases and use cases of one bundle.

Owns the naming and its epochs. Knows nothing of residency, engines or requests: it answers with
immutable records, and whoever holds one is not touched by later changes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from remora_agent.bank.policy import Size
from remora_agent.bank.weights import bank_bytes
from remora_contract.adapter import Adapter, load_adapter
from remora_contract.artifact import check_name
from remora_contract.bundle import Bundle
from remora_contract.compat import adapter_refusals
from remora_contract.digests import short
from remora_contract.errors import Conflict, Exhausted, Incompatible, NotFound, RequestInvalid
from remora_contract.experiments import Arm, Experiment
from remora_contract.release import BASE_USE_CASES, WeightedName, check_use_case_name

MAX_REVISIONS = 4096
MAX_USE_CASES = 1024


@dataclass(frozen=True)
class Registered:
    """A revision of an adapter on this device. `digest` is its identity, names are for people."""

    name: str
    revision: str
    digest: str
    directory: Path
    rank: int  # bank columns it takes
    bytes: int  # of its files
    bank_bytes: int  # in the bank, as float32
    invocation_tokens: tuple[int, ...] = ()  # Activated LoRA: acts from them on; empty: always

    @property
    def size(self) -> Size:
        return Size(self.rank, self.bank_bytes)


@dataclass(frozen=True)
class Alias:
    """What a bare name answers with. `epoch` grows by one with every change of the name."""

    name: str
    revision: str
    digest: str
    epoch: int


@dataclass(frozen=True)
class UseCase:
    """A named, weighted composition of adapters; the names are resolved at each request."""

    name: str
    adapters: tuple[WeightedName, ...]


@dataclass(frozen=True)
class Declared:
    """An experiment of the release that serves. `mixes`: what each arm runs, as digests with
    weights; an arm is counted under its identity only while it really runs that."""

    experiment: Experiment
    identities: Mapping[str, str]  # by arm
    mixes: Mapping[str, tuple[tuple[str, float], ...]]


class AdapterDirectory:
    """Thread-safe. Everything but `register`'s reading of adapter.json is a dictionary look-up."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._lock = threading.Lock()
        self._revisions: dict[tuple[str, str], Registered] = {}
        self._aliases: dict[str, Alias] = {}
        self._epochs: dict[str, int] = {}  # survives `forget`: an epoch is never seen twice
        self._use_cases: dict[str, UseCase] = {}
        self._experiments: dict[str, Declared] = {}
        self._swaps = 0

    @property
    def swaps(self) -> int:
        """How often an alias that answered was pointed anew."""
        return self._swaps

    def register(
        self, name: str, revision: str | None, directory: Path, *, set_alias: bool = False
    ) -> Registered:
        """Makes a converted adapter known; `revision` None is the first 12 digits of its digest.

        Registering the same bytes again moves the record to `directory`. The first revision of a
        name becomes its alias target, a later one with `set_alias`. Raises Conflict when the
        revision names other bytes, Incompatible, ArtifactInvalid, DocumentInvalid, Exhausted.
        """
        adapter = load_adapter(directory)
        record = self._record(name, revision, directory, adapter)
        key = (record.name, record.revision)
        with self._lock:
            known = self._revisions.get(key)
            if known is not None and known.digest != record.digest:
                raise Conflict(
                    f"adapter {name} revision {record.revision} is already registered with digest "
                    f"{short(known.digest)}, not {short(record.digest)}; choose another revision"
                )
            if known is None and len(self._revisions) >= MAX_REVISIONS:
                raise Exhausted(f"{MAX_REVISIONS} adapter revisions are registered; forget some")
            self._revisions[key] = record
            alias = self._aliases.get(name)
            if alias is None:
                self._point(record)
            elif set_alias and alias.revision != record.revision:
                self._swaps += 1
                self._point(record)
        return record

    def set_alias(self, name: str, revision: str, expected_epoch: int | None = None) -> Alias:
        """Points `name` at a registered revision. Setting what it already points at is a change
        too: the epoch grows. Raises NotFound, and Conflict when the epoch is not the expected."""
        with self._lock:
            record = self._find(name, revision)
            epoch = self._epochs.get(name, 0)
            if expected_epoch is not None and expected_epoch != epoch:
                raise Conflict(
                    f"the alias of adapter {name} is at epoch {epoch}, not {expected_epoch}; "
                    "read it again and decide anew"
                )
            self._swaps += 1
            return self._point(record)

    def resolve(self, name: str, revision: str | None = None) -> Registered:
        """The record a request uses: of the revision, or of the name's alias. Raises NotFound."""
        with self._lock:
            return self._find(name, revision)

    def alias(self, name: str) -> Alias:
        """Raises NotFound."""
        with self._lock:
            if name not in self._aliases:
                raise self._unknown(name, None)
            return self._aliases[name]

    def is_alias_target(self, record: Registered) -> bool:
        with self._lock:
            alias = self._aliases.get(record.name)
            return alias is not None and alias.revision == record.revision

    def forget(self, name: str, revision: str) -> Registered:
        """Removes a revision; the files stay. Raises NotFound, and Conflict while the name's alias
        points to it and other revisions exist, or a use case or an experiment needs the name."""
        with self._lock:
            record = self._find(name, revision)
            others = [r for r in self._revisions.values() if r.name == name and r != record]
            self._check_forgettable(record, has_others=bool(others))
            del self._revisions[name, revision]
            if not others:
                self._aliases.pop(name, None)
            return record

    def revisions(self) -> tuple[Registered, ...]:
        """All records, sorted by name and revision."""
        with self._lock:
            return tuple(self._revisions[key] for key in sorted(self._revisions))

    def aliases(self) -> tuple[Alias, ...]:
        """Sorted by name."""
        with self._lock:
            return tuple(self._aliases[name] for name in sorted(self._aliases))

    def set_use_case(self, name: str, adapters: Sequence[WeightedName]) -> UseCase:
        """Creates or replaces. Raises NotFound for an unknown adapter, RequestInvalid."""
        check_use_case_name(name, "use case name")
        names = [a.name for a in adapters]
        if not (names or name in BASE_USE_CASES) or len(set(names)) != len(names):
            raise RequestInvalid(f"use case {name} must name at least one adapter, each once")
        if not all(math.isfinite(a.weight) for a in adapters):
            raise RequestInvalid(f"use case {name}: weights must be finite numbers")
        use_case = UseCase(name, tuple(adapters))
        with self._lock:
            for adapter in names:
                self._find(adapter, None)
            if name not in self._use_cases and len(self._use_cases) >= MAX_USE_CASES:
                raise Exhausted(f"{MAX_USE_CASES} use cases exist; delete some")
            self._use_cases[name] = use_case
        return use_case

    def delete_use_case(self, name: str) -> bool:
        """Whether it existed. Raises Conflict while an experiment needs it."""
        with self._lock:
            self._check_no_arm(lambda arm: arm.use_case == name, f"use case {name}")
            return self._use_cases.pop(name, None) is not None

    def use_case(self, name: str) -> UseCase:
        """Raises NotFound."""
        with self._lock:
            if name not in self._use_cases:
                known = ", ".join(sorted(self._use_cases)) or "none"
                raise NotFound(f"no use case is named {name[:80]!r} (known: {known[:400]})")
            return self._use_cases[name]

    def use_cases(self) -> tuple[UseCase, ...]:
        """Sorted by name."""
        with self._lock:
            return tuple(self._use_cases[name] for name in sorted(self._use_cases))

    def set_experiments(self, declared: Iterable[Declared]) -> None:
        """These and no others. Their names win over adapters and use cases of the same name, where
        a request says nothing more than the name."""
        with self._lock:
            self._experiments = {d.experiment.name: d for d in declared}

    def experiment(self, name: str) -> Declared | None:
        with self._lock:
            return self._experiments.get(name)

    def experiments(self) -> tuple[Declared, ...]:
        """Sorted by name."""
        with self._lock:
            return tuple(self._experiments[name] for name in sorted(self._experiments))

    def _record(
        self, name: str, revision: str | None, directory: Path, adapter: Adapter
    ) -> Registered:
        check_name(name, "adapter name")
        revision = short(adapter.digest) if revision is None else revision
        check_name(revision, "adapter revision")
        if refusals := adapter_refusals(self._bundle, adapter):
            raise Incompatible(refusals)
        return Registered(
            name,
            revision,
            adapter.digest,
            directory,
            adapter.rank,
            adapter.bytes,
            bank_bytes(adapter, self._bundle.decoder),
            adapter.invocation_tokens,
        )

    def _find(self, name: str, revision: str | None) -> Registered:
        if revision is None and name in self._aliases:
            revision = self._aliases[name].revision
        record = self._revisions.get((name, revision)) if revision is not None else None
        if record is None:
            raise self._unknown(name, revision)
        return record

    def _unknown(self, name: str, revision: str | None) -> NotFound:
        revisions = sorted(r.revision for r in self._revisions.values() if r.name == name)
        if revision is not None and revisions:
            return NotFound(
                f"adapter {name} has no revision {revision[:80]!r} "
                f"(known: {', '.join(revisions)[:400]})"
            )
        known = ", ".join(sorted(self._aliases)) or "none"
        return NotFound(f"no adapter is named {name[:80]!r} (known: {known[:400]})")

    def _point(self, record: Registered) -> Alias:
        epoch = self._epochs.get(record.name, 0) + 1
        self._epochs[record.name] = epoch
        alias = Alias(record.name, record.revision, record.digest, epoch)
        self._aliases[record.name] = alias
        return alias

    def _check_forgettable(self, record: Registered, *, has_others: bool) -> None:
        alias = self._aliases.get(record.name)
        if has_others and alias is not None and alias.revision == record.revision:
            raise Conflict(
                f"adapter {record.name} answers with revision {record.revision}; "
                "point the name at another revision first"
            )
        users = [
            u.name
            for u in self._use_cases.values()
            if any(a.name == record.name for a in u.adapters)
        ]
        if users and not has_others:
            raise Conflict(f"use case {users[0]} needs adapter {record.name}; delete it first")
        if not has_others:
            self._check_no_arm(lambda arm: arm.adapter == record.name, f"adapter {record.name}")

    def _check_no_arm(self, answers: Callable[[Arm], bool], what: str) -> None:
        """Raises Conflict where an arm of an experiment `answers` with `what`."""
        for declared in self._experiments.values():
            for arm in filter(answers, declared.experiment.arms):
                raise Conflict(
                    f"{what} answers for arm {arm.name} of experiment {declared.experiment.name}; "
                    "it can go once a release without the experiment serves"
                )
