"""Model names of this surface: BASE (also by its aliases), BASE:ADAPTER, BASE:USE_CASE and
BASE:EXPERIMENT.

A version is "1" for a base and its use cases, "experiment" for an experiment, and a revision for an
adapter; empty is the one that answers by default. Pure: reads the directory that it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from remora_agent.bank.directory import AdapterDirectory
from remora_agent.runtime.api import AdapterRef
from remora_agent.serving.call import AdapterSelection, UseCaseRef
from remora_contract.errors import NotFound, RequestInvalid

BASE_ALIASES = ("ensemble", "tensorrt_llm_bls")
BASE_VERSION = "1"
EXPERIMENT_VERSION = "experiment"
SEPARATOR = ":"


@dataclass(frozen=True)
class Target:
    """What a model name stands for. `name` and `version` have no alias and no default in them."""

    name: str
    version: str
    selection: AdapterSelection = ()


def resolve(name: str, version: str, base: str, directory: AdapterDirectory) -> Target:
    """`base`: the name of the model that serves. Raises NotFound, RequestInvalid for a name that
    both an adapter and a use case have."""
    for known in (base, *BASE_ALIASES):
        if name == known:
            _check_version(name, version, (BASE_VERSION,))
            return Target(base, BASE_VERSION)
        if name.startswith(known + SEPARATOR):
            return _composed(name[len(known) + 1 :], version, base, directory)
    raise NotFound(
        f"no model is named {name[:120]!r}; there are {base}, {base}:ADAPTER and {base}:USE_CASE "
        "(the repository index lists them)"
    )


def has_adapter(name: str, directory: AdapterDirectory) -> bool:
    try:
        directory.alias(name)
    except NotFound:
        return False
    return True


def has_use_case(name: str, directory: AdapterDirectory) -> bool:
    try:
        directory.use_case(name)
    except NotFound:
        return False
    return True


def _composed(part: str, version: str, base: str, directory: AdapterDirectory) -> Target:
    full = f"{base}{SEPARATOR}{part}"
    if version in ("", EXPERIMENT_VERSION) and directory.experiment(part) is not None:
        # Its arms answer, whatever else has the name; another version asks for that.
        return Target(full, EXPERIMENT_VERSION, UseCaseRef(part))
    if not has_use_case(part, directory):
        record = directory.resolve(part, version or None)
        return Target(full, record.revision, (AdapterRef(part, version or None),))
    if has_adapter(part, directory):
        raise RequestInvalid(
            f"{part} is an adapter and a use case; choose with the input adapter or use_case"
        )
    _check_version(full, version, (BASE_VERSION,))
    return Target(full, BASE_VERSION, UseCaseRef(part))


def _check_version(name: str, version: str, known: Sequence[str]) -> None:
    if version and version not in known:
        raise NotFound(
            f"model {name[:120]} has no version {version[:40]!r} (known: {', '.join(known)})"
        )
