"""The objects of /v1/models. Pure."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from remora_agent.bank.directory import AdapterDirectory
from remora_agent.serving.call import AdapterSelection, UseCaseRef
from remora_agent.serving.openai.naming import listed_names, meaning_of
from remora_contract.errors import NotFound
from remora_contract.experiments import Arm

_OWNER = "remora"


def model_list(
    base: str, directory: AdapterDirectory, context: int, created: int
) -> dict[str, Any]:
    data = []
    for name, selection in listed_names(base, directory).items():
        with suppress(NotFound):  # an adapter forgotten since
            data.append(_model(name, selection, base, directory, context, created))
    return {"object": "list", "data": data}


def model_object(
    name: str, base: str, directory: AdapterDirectory, context: int, created: int
) -> dict[str, Any]:
    """Raises ModelUnknown, FieldInvalid (a name with two meanings)."""
    selection = meaning_of(name, base, directory)
    return _model(name, selection, base, directory, context, created)


def _model(
    name: str,
    selection: AdapterSelection,
    base: str,
    directory: AdapterDirectory,
    context: int,
    created: int,
) -> dict[str, Any]:
    made: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": _OWNER,
        "root": base,
        "parent": base if selection != () else None,
        "max_model_len": context,
    }
    declared = directory.experiment(selection.name) if isinstance(selection, UseCaseRef) else None
    if declared is not None:
        arms = {arm.name: _arm(arm) for arm in declared.experiment.arms}
        return {**made, "experiment": {"arms": arms}}
    if isinstance(selection, UseCaseRef):
        return {**made, "use_case": _mix(selection.name, directory)}
    for ref in selection:
        record = directory.resolve(ref.name, ref.revision)
        made["adapter"] = {
            "name": record.name,
            "revision": record.revision,
            "digest": record.digest,
        }
    return made


def _arm(arm: Arm) -> dict[str, Any]:
    target = {"use_case": arm.use_case} if arm.use_case else {"adapter": arm.adapter}
    return {**target, "percent": arm.percent}


def _mix(use_case: str, directory: AdapterDirectory) -> dict[str, float]:
    """Empty for one that was deleted since it was listed."""
    try:
        return {a.name: a.weight for a in directory.use_case(use_case).adapters}
    except NotFound:
        return {}
