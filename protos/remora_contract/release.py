"""A release: what a device is to run, declaratively. Immutable; its digest is its identity."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from remora_contract.artifact import check_name
from remora_contract.digests import check_digest, digest_document, short
from remora_contract.errors import DocumentInvalid
from remora_contract.experiments import Experiment, arm_identity, arm_mix, check_experiments
from remora_contract.gates import GateSet
from remora_contract.quant import QuantKind
from remora_contract.versions import check_range, version_numbers
from remora_contract.windows import parse_windows

FORMAT_VERSION = 1
MAX_MIX = 8  # adapters in one use case or request
MAX_ENGINES = 64  # one for each class of device
MAX_WEIGHT = 100.0  # of an adapter, either sign
# The use cases that name no adapter: the base model alone, as QAIRT calls it.
BASE_USE_CASES = ("base", "Base")
# Unlike artifacts', these names become no file names, and QAIRT joins adapters' names with "+".
_USE_CASE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")


@dataclass(frozen=True)
class ReleaseAdapter:
    """An adapter by name; the name's alias on the device points to this revision."""

    name: str
    revision: str
    digest: str

    def __post_init__(self) -> None:
        check_name(self.name, "adapter name")
        check_name(self.revision, "adapter revision")
        check_digest(self.digest, f"adapter {self.name}")


@dataclass(frozen=True)
class WeightedName:
    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class ReleaseUseCase:
    name: str
    adapters: tuple[WeightedName, ...]

    def __post_init__(self) -> None:
        check_use_case_name(self.name, "use case name")
        if not self.adapters and self.name not in BASE_USE_CASES:
            raise ValueError(
                f"use case {self.name} names no adapter; only {' or '.join(BASE_USE_CASES)} may, "
                "which is the base model alone"
            )


@dataclass(frozen=True)
class SamplingDefaults:
    """What a request that does not say otherwise gets; None says nothing."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    min_tokens: int | None = None


@dataclass(frozen=True)
class Constraints:
    """What a device must have, checked before anything is shipped to it.

    The newer ones default to None, not to empty: a release that does not use them is the same
    document as before there were any."""

    min_memory_bytes: int | None = None
    min_agent_version: str | None = None
    backends: tuple[str, ...] = ()  # one of these
    min_disk_free_bytes: int | None = None  # before it fetches; nothing where nothing is lacking
    # By name, for example {"tensorrt": "10.3"}; of those named a device must have one, new enough.
    min_backend_versions: dict[str, str] | None = None
    sm: tuple[int, ...] | None = None  # GPUs: one of these, 87 for compute capability 8.7
    agent_version: str | None = None  # a range, ">=0.3,<0.5"
    # Ranges by name, {"tensorrt": ">=10.3,<11"}; as for min_backend_versions one will do.
    backend_versions: dict[str, str] | None = None

    def __post_init__(self) -> None:
        if self.sm is not None and not (self.sm and all(10 <= sm <= 999 for sm in self.sm)):
            raise ValueError("sm lists compute capabilities without the dot, for example [86, 87]")
        if self.min_disk_free_bytes is not None and self.min_disk_free_bytes < 0:
            raise ValueError("min_disk_free_bytes is not negative")
        for name, version in (self.min_backend_versions or {}).items():
            if not version_numbers(version):
                raise ValueError(f"{version[:40]!r} is no version of {name[:40]}: write 10.3")
        if self.agent_version is not None:
            check_range(self.agent_version)
        for versions in (self.backend_versions or {}).values():
            check_range(versions)


@dataclass(frozen=True)
class Release:
    format_version: int
    name: str
    bundle: str  # digest
    adapters: tuple[ReleaseAdapter, ...] = ()
    use_cases: tuple[ReleaseUseCase, ...] = ()
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    constraints: Constraints = field(default_factory=Constraints)
    gates: GateSet | None = None
    windows: tuple[str, ...] | None = None  # of devices without a window label
    # Engines built elsewhere, by digest: a device takes the one whose key is its own. None, not
    # empty: a release without them is the same document as before there were any.
    engines: tuple[str, ...] | None = None
    quant: QuantKind | None = None  # what the bundle's weights must be stored as; None: as they are
    experiments: tuple[Experiment, ...] | None = None  # None for the same reason

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(f"format version {self.format_version} is not {FORMAT_VERSION}")
        check_name(self.name, "release name")
        check_digest(self.bundle, "bundle")
        names = [a.name for a in self.adapters]
        if len(set(names)) != len(names):
            raise ValueError("an adapter name is listed twice")
        check_use_cases(self.use_cases, names)
        _check_gates(self)
        _check_engines(self.engines)
        if self.experiments is not None:
            check_experiments(self.experiments, names, [u.name for u in self.use_cases])

    @property
    def digest(self) -> str:
        return digest_document(self)

    @property
    def release_id(self) -> str:
        """`name-<first 12 hex digits of the digest>`: short to type, still unique."""
        return f"{self.name}-{short(self.digest)}"

    def artifact_digests(self) -> tuple[str, ...]:
        """What every device fetches."""
        return (self.bundle, *(a.digest for a in self.adapters))

    def all_digests(self) -> tuple[str, ...]:
        """With the engines, of which a device fetches one at most."""
        return (*self.artifact_digests(), *(self.engines or ()))


def arm_identities(
    experiment: Experiment,
    bundle: str,
    adapters: Mapping[str, str],
    use_cases: Iterable[ReleaseUseCase],
) -> dict[str, str]:
    """Of each arm by name; `bundle` is a digest, `adapters` are digests by name. See
    `arm_identity`."""
    named = {u.name: [(a.name, a.weight) for a in u.adapters] for u in use_cases}
    mixes = {arm.name: arm_mix(arm, adapters, named) for arm in experiment.arms}
    shadow = experiment.shadow
    compared = {} if shadow is None else {shadow.candidate: mixes[shadow.incumbent]}
    return {
        arm.name: arm_identity(experiment, arm, bundle, mixes[arm.name], compared.get(arm.name))
        for arm in experiment.arms
    }


def _check_engines(engines: tuple[str, ...] | None) -> None:
    """Raises ValueError, DocumentInvalid."""
    if engines is None:
        return
    if not engines:
        raise ValueError("engines is empty; leave it out")
    if len(engines) > MAX_ENGINES:
        raise ValueError(f"{len(engines)} engines; at most {MAX_ENGINES}")
    if len(set(engines)) != len(engines):
        raise ValueError("an engine is listed twice")
    for digest in engines:
        check_digest(digest, "engine")


def _check_gates(release: Release) -> None:
    """Raises ValueError for golden questions to what the release has not, and for windows."""
    known = {a.name for a in release.adapters} | {u.name for u in release.use_cases}
    for question in release.gates.golden if release.gates else ():
        if question.use_case is not None and question.use_case not in known:
            raise ValueError(
                f"golden question {question.name} asks {question.use_case[:80]}, which is neither "
                "an adapter nor a use case of the release"
            )
    parse_windows(release.windows or ())


def check_use_case_name(text: str, what: str) -> str:
    """Raises DocumentInvalid."""
    if not _USE_CASE_NAME.fullmatch(text):
        raise DocumentInvalid(
            f"{what} {text[:80]!r}: use letters, digits, '.', '_', '+' and '-', at most 128 "
            "characters"
        )
    return text


def check_use_cases(use_cases: Iterable[ReleaseUseCase], adapters: Iterable[str]) -> None:
    """What no device could answer with: a name twice, an adapter that is not among `adapters` or
    named twice, too many, a weight out of range. Raises ValueError."""
    known = set(adapters)
    seen: set[str] = set()
    for use_case in use_cases:
        if use_case.name in seen:
            raise ValueError(f"use case {use_case.name} is listed twice")
        seen.add(use_case.name)
        _check_mix(use_case, known)


def _check_mix(use_case: ReleaseUseCase, known: set[str]) -> None:
    names = [used.name for used in use_case.adapters]
    if len(names) > MAX_MIX:
        raise ValueError(f"use case {use_case.name}: {len(names)} adapters; at most {MAX_MIX}")
    for used in use_case.adapters:
        if used.name not in known:
            raise ValueError(f"use case {use_case.name} names unknown adapter {used.name[:80]}")
        if names.count(used.name) > 1:
            raise ValueError(
                f"use case {use_case.name} names adapter {used.name} twice; add up the weights"
            )
        if not abs(used.weight) <= MAX_WEIGHT:  # NaN fails this too
            raise ValueError(
                f"use case {use_case.name}: the weight of {used.name} must be within "
                f"±{MAX_WEIGHT:g}, not {used.weight}"
            )
