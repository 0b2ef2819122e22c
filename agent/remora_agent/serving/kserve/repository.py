"""The model repository: what the device has, and loading and unloading adapters by model name.

Blocking calls, for worker threads. Nothing a client sends is taken as a path or as a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from remora_agent.bank.directory import UseCase
from remora_agent.runtime.adapters import AdapterInfo, Tier
from remora_agent.runtime.api import AdapterRef
from remora_agent.serving.call import AdapterSelection, UseCaseRef
from remora_agent.serving.experiments import arm_selection
from remora_agent.serving.kserve.names import (
    BASE_VERSION,
    EXPERIMENT_VERSION,
    SEPARATOR,
    resolve,
)
from remora_agent.serving.served_model import ServedModel
from remora_contract.errors import Refused, RequestInvalid, Unsupported
from remora_protos.kserve.v2 import grpc_service_pb2 as pb

READY, UNAVAILABLE, UNLOADING = "READY", "UNAVAILABLE", "UNLOADING"
UNLOAD_DEPENDENTS = "unload_dependents"


def index(model: ServedModel, *, ready_only: bool) -> pb.RepositoryIndexResponse:
    """The base model, each revision of each adapter, each use case. READY is in the bank; what is
    not is loaded by its first request."""
    base, adapters = model.runtime.bundle.source.name, model.runtime.adapters
    infos = adapters.list()
    response = pb.RepositoryIndexResponse()
    response.models.add(name=base, version=BASE_VERSION, state=READY)
    for info in infos:
        state, reason = _adapter_state(info)
        name = f"{base}{SEPARATOR}{info.name}"
        response.models.add(name=name, version=info.revision, state=state, reason=reason)
    resident = {i.name for i in infos if i.alias_target and i.tier is Tier.BANK}
    for use_case in adapters.directory.use_cases():
        state, reason = _use_case_state(use_case, resident)
        name = f"{base}{SEPARATOR}{use_case.name}"
        response.models.add(name=name, version=BASE_VERSION, state=state, reason=reason)
    for declared in adapters.directory.experiments():
        name = f"{base}{SEPARATOR}{declared.experiment.name}"
        response.models.add(name=name, version=EXPERIMENT_VERSION, state=READY)
    if ready_only:
        kept = [m for m in response.models if m.state == READY]
        return pb.RepositoryIndexResponse(models=kept)
    return response


def load(model: ServedModel, name: str, parameters: Mapping[str, Any], timeout_s: float) -> None:
    """Brings an adapter, or those of a use case, into the bank. The base model is there already.
    Raises NotFound, Unsupported for overrides, and what Adapters.load raises."""
    for given in sorted(parameters):
        raise Unsupported(
            f"parameter {given[:80]}: a client cannot bring configuration or files; register the "
            "adapter on the device"
        )
    adapters = model.runtime.adapters
    for ref in _adapters_of(model, name):
        adapters.load(ref.name, ref.revision, timeout_s=timeout_s)


def unload(model: ServedModel, name: str, parameters: Mapping[str, Any]) -> None:
    """Takes an adapter out of the bank when its last request ends; a later request loads it anew.
    Raises NotFound, Refused for the base model and for a use case alone, RequestInvalid."""
    dependents = _unload_dependents(parameters)
    refs = _adapters_of(model, name)
    if not refs:
        raise Refused(
            f"{name[:120]} is the model that serves; it goes when another release comes or the "
            "agent stops"
        )
    if _is_use_case(model, name) and not dependents:
        raise Refused(
            f"{name[:120]} is a use case and holds nothing itself; unload its adapters by name, or "
            f"with {UNLOAD_DEPENDENTS}"
        )
    for ref in refs:
        model.runtime.adapters.unload(ref.name, ref.revision)


def check_repository(name: str) -> None:
    if name:
        raise RequestInvalid(
            f"repository_name: there is one repository without a name, not {name[:80]!r}"
        )


def versions(model: ServedModel, name: str, version: str) -> tuple[str, ...]:
    """All that the model of this name has. Raises NotFound."""
    selection = _resolved(model, name, version)
    if isinstance(selection, UseCaseRef):
        known = model.runtime.adapters.directory.experiment(selection.name)
        return (BASE_VERSION,) if known is None else (EXPERIMENT_VERSION,)
    if not selection:
        return (BASE_VERSION,)
    records = model.runtime.adapters.directory.revisions()
    return tuple(r.revision for r in records if r.name == selection[0].name)


def _adapters_of(model: ServedModel, name: str) -> Sequence[AdapterRef]:
    selection = _resolved(model, name, "")
    if not isinstance(selection, UseCaseRef):
        return selection
    declared = model.runtime.adapters.directory.experiment(selection.name)
    if declared is not None:
        arms = [arm_selection(arm) for arm in declared.experiment.arms]
        return tuple(ref for arm in arms for ref in _parts(model, arm))
    return _parts(model, selection)


def _parts(model: ServedModel, selection: AdapterSelection) -> Sequence[AdapterRef]:
    if not isinstance(selection, UseCaseRef):
        return selection
    use_case = model.runtime.adapters.directory.use_case(selection.name)
    return tuple(AdapterRef(a.name) for a in use_case.adapters)


def _is_use_case(model: ServedModel, name: str) -> bool:
    return isinstance(_resolved(model, name, ""), UseCaseRef)


def _resolved(model: ServedModel, name: str, version: str) -> AdapterSelection:
    base, directory = model.runtime.bundle.source.name, model.runtime.adapters.directory
    return resolve(name, version, base, directory).selection


def _unload_dependents(parameters: Mapping[str, Any]) -> bool:
    wanted = False
    for name in sorted(parameters):
        if name != UNLOAD_DEPENDENTS or not parameters[name].HasField("bool_param"):
            raise RequestInvalid(
                f"parameter {name[:80]!r}: unloading takes {UNLOAD_DEPENDENTS}, true or false"
            )
        wanted = parameters[name].bool_param
    return wanted


def _adapter_state(info: AdapterInfo) -> tuple[str, str]:
    if info.draining:
        return UNLOADING, f"{info.leases} requests still use it"
    if info.tier is Tier.BANK:
        return READY, ""
    return UNAVAILABLE, f"unloaded, on {info.tier.value}; load it, or its first request does"


def _use_case_state(use_case: UseCase, resident: Set[str]) -> tuple[str, str]:
    missing = [a.name for a in use_case.adapters if a.name not in resident]
    if not missing:
        return READY, ""
    names = ", ".join(missing)
    return UNAVAILABLE, f"adapters not loaded: {names}; load it, or its first request does"
