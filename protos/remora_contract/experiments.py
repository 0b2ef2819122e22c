"""Experiments of a release: a name that requests ask for, and the arms that answer them.

Which arm answers a session is a race that every device runs alike, over whole numbers and decimals:

    u(arm)     = SHA-256(experiment, salt, session, arm) as a number in (0, 1)
    time(arm)  = -ln u(arm) / percent(arm)         the arm with the least time answers

So an arm answers `percent` of all sessions, the same session the same arm everywhere, and when an
arm's share grows against all others, sessions move into that arm alone: only its time got less.
Pure; no I/O, no clock. What an arm's adapters are on a device is not known here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from typing import Any, Literal

from remora_contract.digests import digest_document, short
from remora_contract.errors import DocumentInvalid
from remora_contract.gates import Gate
from remora_contract.strict import parse

MAX_EXPERIMENTS = 4  # of a release
MAX_ARMS = 8  # of all its experiments together: each has a dozen series of metrics
MAX_RULES = 8
MAX_SALT = 128
MAX_SESSION = 256  # characters
SHADOW = "shadow"  # no arm's name: checks write shadow.exact beside candidate.requests
# What devices count, as metrics PREFIX + NAME + "_total", label EXPERIMENT/ARM/IDENTITY.
ARM_PREFIX, SHADOW_PREFIX, TOTAL = "experiment_", "shadow_", "_total"
ARM_COUNTS = (
    "requests",  # ended, failed and cancelled ones included
    "failures",
    "cancelled",  # by whoever asked; seconds and tokens are of answers that went to their end
    "tokens",
    "first_token_seconds",
    "answer_seconds",
    "unkeyed",  # requests without a session: their arm was drawn
)
SHADOW_COUNTS = (
    "offered",  # requests that the declared share chose
    "skipped",  # for lack of spare capacity
    "cancelled",  # because work came
    "failed",
    "compared",  # answered by both
    "exact",  # with the same tokens
    "answer_tokens",  # of the incumbent's answers, compared
    "prefix_tokens",  # of them that the candidate's begins with
    "scored_tokens",  # of them that both were asked about, token by token
    "agreed_tokens",  # where both find the same token likeliest
    "incumbent_nll",  # -sum of the logprobs of these tokens
    "candidate_nll",
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_ARM = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
_SUM_TOLERANCE = 1e-6
_EXACT = Context(prec=40)  # the same digits on every machine, which floats' logarithms are not
_HASH_BITS = 128


@dataclass(frozen=True)
class Arm:
    """What answers a part of the sessions: an adapter, or a use case, of the release."""

    name: str
    percent: float
    adapter: str | None = None
    use_case: str | None = None

    def __post_init__(self) -> None:
        if not _ARM.fullmatch(self.name) or self.name == SHADOW:
            raise ValueError(
                f"arm {self.name[:80]!r}: use letters, digits, '_' and '-', at most 32 characters, "
                f"and not {SHADOW}"
            )
        if not 0 <= self.percent <= 100:
            raise ValueError(f"arm {self.name}: percent is 0 to 100, not {self.percent}")
        if (self.adapter is None) == (self.use_case is None):
            raise ValueError(f"arm {self.name} names either an adapter or a use_case")


@dataclass(frozen=True)
class Shadow:
    """A part of what `incumbent` answers is answered by `candidate` too, for comparison alone."""

    incumbent: str
    candidate: str
    percent: float

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise ValueError(f"shadow: percent is above 0 and at most 100, not {self.percent}")
        if self.incumbent == self.candidate:
            raise ValueError("shadow: incumbent and candidate are two arms")


@dataclass(frozen=True)
class PromotionRule:
    """What has to hold before an arm may become what the name means; see docs/experiments.md."""

    name: str
    check: str

    def __post_init__(self) -> None:
        self.gate()

    def gate(self) -> Gate:
        return Gate(self.name, self.check)


@dataclass(frozen=True)
class Experiment:
    name: str
    arms: tuple[Arm, ...]
    salt: str = ""
    shadow: Shadow | None = None
    promote: tuple[PromotionRule, ...] = ()
    min_requests: int = 100  # of each arm that a rule names, or comparisons; fewer prove nothing
    # pass: the controller promotes by itself. None says no more than documents that never knew it.
    promote_when: Literal["pass"] | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"experiment {self.name[:80]!r}: use letters, digits, '.', '_', '+' and '-', at "
                "most 64 characters"
            )
        names = [arm.name for arm in self.arms]
        if len(names) < 2 or len(set(names)) != len(names):
            raise ValueError(f"experiment {self.name}: at least two arms, each with its own name")
        total = sum(arm.percent for arm in self.arms)
        if abs(total - 100) > _SUM_TOLERANCE:
            raise ValueError(f"experiment {self.name}: percents add up to {total:g}, not to 100")
        if len(self.salt) > MAX_SALT or not self.salt.isprintable():
            raise ValueError(f"experiment {self.name}: salt has at most {MAX_SALT} characters")
        if not 1 <= self.min_requests <= 1_000_000_000:
            raise ValueError(f"experiment {self.name}: min_requests is 1 to 1000000000")
        self._check_shadow(names)
        rules = [rule.name for rule in self.promote]
        if len(rules) > MAX_RULES or len(set(rules)) != len(rules):
            raise ValueError(
                f"experiment {self.name}: at most {MAX_RULES} rules, each with its own name"
            )
        if self.promote_when is not None and not self.promote:
            raise ValueError(f"experiment {self.name}: promote_when needs rules under promote")

    def _check_shadow(self, names: Sequence[str]) -> None:
        shadow = self.shadow
        for arm in () if shadow is None else (shadow.incumbent, shadow.candidate):
            if arm not in names:
                raise ValueError(f"experiment {self.name}: shadow names no arm {arm[:80]!r}")

    def arm(self, name: str) -> Arm:
        """One that is there."""
        return next(arm for arm in self.arms if arm.name == name)


def check_experiments(
    experiments: Sequence[Experiment], adapters: Collection[str], use_cases: Collection[str]
) -> None:
    """What no device could serve. Raises ValueError."""
    names = [e.name for e in experiments]
    if len(set(names)) != len(names):
        raise ValueError("an experiment is listed twice")
    arms = sum(len(e.arms) for e in experiments)
    if not experiments or len(names) > MAX_EXPERIMENTS or arms > MAX_ARMS:
        raise ValueError(
            f"1 to {MAX_EXPERIMENTS} experiments with at most {MAX_ARMS} arms together, not "
            f"{len(names)} with {arms}; leave experiments out where there are none"
        )
    for experiment in experiments:
        for arm in experiment.arms:
            _check_target(experiment.name, arm, adapters, use_cases)


def _check_target(
    experiment: str, arm: Arm, adapters: Collection[str], use_cases: Collection[str]
) -> None:
    where = f"experiment {experiment}, arm {arm.name}"
    if arm.adapter is not None and arm.adapter not in adapters:
        raise ValueError(f"{where}: the release has no adapter {arm.adapter[:80]!r}")
    if arm.use_case is not None and arm.use_case not in use_cases:
        raise ValueError(f"{where}: the release has no use case {arm.use_case[:80]!r}")
    if arm.use_case is not None and experiment in adapters:
        raise ValueError(
            f"{where}: {experiment} is an adapter, so its arms are adapters; name the experiment "
            "otherwise to let a use case answer"
        )


def assign(experiment: Experiment, session: str) -> Arm:
    """The arm that answers a session."""
    running = [arm for arm in experiment.arms if arm.percent > 0]
    return min(running, key=lambda arm: (_time(experiment, session, arm), arm.name))


def is_compared(experiment: Experiment, request_id: str) -> bool:
    """Whether the shadow is to answer a request of its incumbent too: u(shadow) of its id is below
    the share. A larger share keeps what a smaller one chose."""
    shadow = experiment.shadow
    if shadow is None:
        return False
    return _drawn(experiment, request_id, SHADOW) * 100 < Decimal(shadow.percent)


def _time(experiment: Experiment, session: str, arm: Arm) -> Decimal:
    drawn = _drawn(experiment, session, arm.name)
    return _EXACT.divide(-_EXACT.ln(drawn), Decimal(arm.percent))


def _drawn(experiment: Experiment, key: str, name: str) -> Decimal:
    """u(name), in (0, 1)."""
    parts = (b"remora experiment 1", *map(str.encode, (experiment.name, experiment.salt)))
    hasher = hashlib.sha256()
    # A lone surrogate, which JSON can carry, is hashed as it is.
    for part in (*parts, key.encode(errors="surrogatepass"), name.encode()):
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    drawn = int.from_bytes(hasher.digest()[: _HASH_BITS // 8], "big")
    return _EXACT.divide(Decimal(2 * drawn + 1), Decimal(2 << _HASH_BITS))


Mix = Sequence[tuple[str, float]]  # adapters' digests with their weights


def arm_identity(
    experiment: Experiment, arm: Arm, bundle: str, mix: Mix, compared: Mix | None = None
) -> str:
    """12 hex digits for what the arm is: other bytes, of the bundle (a digest) too, other weights
    or salt are another arm, whose statistics begin anew; another share is not. `compared`: what
    the arm is the shadow of, for it is counted how the two agree."""
    parts = [experiment.name, experiment.salt, arm.name, bundle, _plain(mix)]
    if compared is not None:
        parts.append(_plain(compared))
    return short(digest_document(parts))


def _plain(mix: Mix) -> list[list[object]]:
    return [[digest, float(weight)] for digest, weight in mix]


def arm_mix(
    arm: Arm, digests: Mapping[str, str], use_cases: Mapping[str, Sequence[tuple[str, float]]]
) -> list[tuple[str, float]]:
    """What the arm runs: `digests` of the release's adapters by name, `use_cases` as adapters'
    names with weights."""
    named = use_cases[arm.use_case] if arm.use_case is not None else [(str(arm.adapter), 1.0)]
    return [(digests[name], weight) for name, weight in named]


def written_experiments(data: object, where: str) -> tuple[Experiment, ...]:
    """As people write them: tables of names, or lists of what has a `name`.

        sql:
          salt: spring
          arms: {control: {adapter: sql, percent: 90}, candidate: {adapter: sql-2, percent: 10}}
          promote: {errors: candidate.failures / candidate.requests < 0.01}

    Raises DocumentInvalid naming the key.
    """
    entries = []
    for entry in _named(data, where):
        if isinstance(entry, dict):
            rules = entry.get("promote")
            if isinstance(rules, dict):
                rules = [{"name": name, "check": check} for name, check in rules.items()]
            parts = {"arms": _named(entry.get("arms"), f"{where}: arms"), "promote": rules}
            entry = {**entry, **{k: v for k, v in parts.items() if v is not None}}
        entries.append(entry)
    return parse(_Written, {"experiments": entries}, where).experiments


@dataclass(frozen=True)
class _Written:
    experiments: tuple[Experiment, ...]


def _named(data: object, where: str) -> Any:
    """A table of tables as a list of them, each with its `name`. Raises DocumentInvalid."""
    if not isinstance(data, dict):
        return data
    found = []
    for name, entry in data.items():
        if isinstance(entry, dict) and "name" in entry:
            raise DocumentInvalid(f"{where}.{name}: unknown key 'name': its key is the name")
        found.append({"name": name, **entry} if isinstance(entry, dict) else entry)
    return found
