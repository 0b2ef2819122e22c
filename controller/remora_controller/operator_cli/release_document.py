"""Releases as people write them -> releases as devices get them. Pure.

People name artifacts `NAME` (newest revision), `NAME@REVISION` or by digest; a release holds
digests only, so what was resolved once never changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from remora_contract.errors import DocumentInvalid, Incompatible, NotFound, UsageWrong
from remora_contract.experiments import Experiment, written_experiments
from remora_contract.gates import GateSet
from remora_contract.quant import QuantKind
from remora_contract.release import (
    FORMAT_VERSION,
    Constraints,
    Release,
    ReleaseAdapter,
    ReleaseUseCase,
    SamplingDefaults,
    WeightedName,
)
from remora_contract.release_rules import document_refusals, unknown_backends
from remora_contract.strict import loads, parse
from remora_contract.use_case_forms import parse_use_cases, written_use_cases
from remora_contract.use_cases import UseCaseDocument
from remora_contract.yaml_text import load_yaml

_SHOWN = 6


class Named(Protocol):
    """What the controller lists of a published artifact, newest first."""

    @property
    def kind(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def revision(self) -> str: ...
    @property
    def digest(self) -> str: ...


@dataclass(frozen=True)
class ReleaseFile:
    """release.yaml."""

    name: str
    bundle: str
    adapters: dict[str, str] = field(default_factory=dict)  # name -> reference
    use_cases: tuple[ReleaseUseCase, ...] = ()
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    constraints: Constraints = field(default_factory=Constraints)
    gates: GateSet | None = None
    windows: tuple[str, ...] | None = None
    engines: tuple[str, ...] = ()  # references
    quant: QuantKind | None = None  # what the bundle must be
    experiments: tuple[Experiment, ...] | None = None


def read_release_file(data: bytes, where: str) -> ReleaseFile:
    """Strict YAML. Raises DocumentInvalid naming the key."""
    return parse_release_table(load_yaml(data, where), where)


def parse_release_table(table: object, where: str) -> ReleaseFile:
    """Decoded YAML, strictly. Raises DocumentInvalid naming the key."""
    read: dict[str, Any] = {}
    for key, written in (("use_cases", written_use_cases), ("experiments", written_experiments)):
        if isinstance(table, dict) and key in table:
            read[key] = written(table[key], f"{where}: {key}")
            table = {**table, key: []}
    return replace(parse(ReleaseFile, table, where), **read)


def read_use_cases(data: bytes, where: str) -> UseCaseDocument:
    """QAIRT's lora_config.yaml or a use_cases.json. Raises DocumentInvalid naming the key."""
    if where.endswith(".json"):
        return parse_use_cases(loads(dict[str, Any], data, where), where)
    return parse_use_cases(load_yaml(data, where), where)


def from_flags(
    name: str,
    bundle: str,
    adapters: Sequence[str],
    use_cases: Sequence[str],
    document: UseCaseDocument | None = None,
) -> ReleaseFile:
    """`--adapter NAME=REF`, `--use-case NAME=A:0.7,B:0.3`, `--use-cases FILE`. An adapter that only
    the file names is the one of its digest where the file says it, else of its name. Raises
    UsageWrong."""
    references = pairs(adapters, "--adapter", "NAME=REF")
    compositions = tuple(
        ReleaseUseCase(key, tuple(WeightedName(a, w) for a, w in _weights(text).items()))
        for key, text in pairs(use_cases, "--use-case", "NAME=ADAPTER:WEIGHT,…").items()
    )
    if document is not None:
        named = {a.name: a.digest or a.name for a in document.adapters}
        references = {**named, **references}
        compositions = (*compositions, *document.release_use_cases())
    return ReleaseFile(name=name, bundle=bundle, adapters=references, use_cases=compositions)


def pairs(texts: Sequence[str], flag: str, form: str) -> dict[str, str]:
    """`A=B` options as a dict. Raises UsageWrong."""
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals or not value:
            raise UsageWrong(f"{flag} {text!r}: write {form}")
        if key in found:
            raise UsageWrong(f"{flag} names {key} twice")
        found[key] = value
    return found


def _weights(text: str) -> dict[str, float]:
    weights = {}
    for part in text.split(","):
        name, _, weight = part.partition(":")
        try:
            weights[name] = float(weight or "1")
        except ValueError as e:
            raise UsageWrong(f"weight {weight!r} of adapter {name} is no number") from e
    return weights


def to_release(wanted: ReleaseFile, published: Sequence[Named]) -> Release:
    """Raises NotFound for an unknown reference, DocumentInvalid, Incompatible for values that no
    device could honour."""
    release = _resolved(wanted, published)
    refusals = [*document_refusals(release), *unknown_backends(release.constraints)]
    if refusals:
        raise Incompatible(refusals)
    return release


def _resolved(wanted: ReleaseFile, published: Sequence[Named]) -> Release:
    adapters = [adapter_entry(n, ref, published) for n, ref in wanted.adapters.items()]
    try:
        return Release(
            format_version=FORMAT_VERSION,
            name=wanted.name,
            bundle=resolve(wanted.bundle, "bundle", published).digest,
            adapters=tuple(adapters),
            use_cases=wanted.use_cases,
            sampling=wanted.sampling,
            constraints=wanted.constraints,
            gates=wanted.gates,
            windows=wanted.windows,
            engines=tuple(resolve(e, "engine", published).digest for e in wanted.engines) or None,
            quant=wanted.quant,
            experiments=wanted.experiments,
        )
    except ValueError as e:
        raise DocumentInvalid(f"release {wanted.name}: {e}") from e


def adapter_entry(name: str, reference: str, published: Sequence[Named]) -> ReleaseAdapter:
    found = resolve(reference, "adapter", published)
    return ReleaseAdapter(name, found.revision, found.digest)


def resolve(reference: str, kind: str, published: Sequence[Named]) -> Named:
    """Raises NotFound listing what there is."""
    of_kind = [p for p in published if p.kind == kind]
    name, at, revision = reference.partition("@")
    for candidate in of_kind:
        by_name = candidate.name == name and (not at or candidate.revision == revision)
        if candidate.digest == reference or by_name:
            return candidate
    there = ", ".join(f"{p.name}@{p.revision}" for p in of_kind[:_SHOWN]) or "none"
    raise NotFound(
        f"no {kind} {reference} in the controller's repository (there: {there}); publish it with "
        "`remora-build publish`"
    )


def derive(base: Release, adapters: Mapping[str, str], published: Sequence[Named]) -> Release:
    """The same release with some adapters replaced or added. Raises NotFound."""
    kept = [a for a in base.adapters if a.name not in adapters]
    new = [adapter_entry(name, ref, published) for name, ref in adapters.items()]
    ordered = sorted([*kept, *new], key=lambda a: a.name)
    return replace(base, adapters=tuple(ordered))
