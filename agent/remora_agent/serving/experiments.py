"""Which arm of an experiment answers a call. Pure: reads the directory that it is given.

A call is in an experiment when it names it and says nothing more: a revision, a weight or a mix is
answered by what it names, whatever runs under the name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from remora_agent.bank.directory import AdapterDirectory, Declared
from remora_agent.runtime.api import AdapterRef, ServedArm
from remora_agent.serving.call import AdapterSelection, GenerateCall, UseCaseRef
from remora_contract.errors import NotFound, RequestInvalid
from remora_contract.experiments import Arm, assign


@dataclass(frozen=True)
class Assigned:
    """The arm that a call gets. `is_keyed`: by its session; else by a draw for this call."""

    declared: Declared
    arm: Arm
    is_keyed: bool

    @property
    def served(self) -> ServedArm:
        return served_arm(self.declared, self.arm)

    @property
    def selection(self) -> AdapterSelection:
        return arm_selection(self.arm)


def served_arm(declared: Declared, arm: Arm) -> ServedArm:
    identity, mix = declared.identities[arm.name], declared.mixes[arm.name]
    return ServedArm(declared.experiment.name, arm.name, identity, mix)


def arm_selection(arm: Arm) -> AdapterSelection:
    return UseCaseRef(arm.use_case) if arm.use_case else (AdapterRef(str(arm.adapter)),)


def assigned(call: GenerateCall, directory: AdapterDirectory) -> Assigned | None:
    """None where the call is in no experiment. The call has a `lot`, where it has no session and
    no client. Raises RequestInvalid for an experiment within a mix."""
    name = bare_name(call.selection)
    if name is None:
        refuse_parts(call.selection, directory)
        return None
    declared = directory.experiment(name)
    if declared is None:
        return None
    key = call.session or call.share.client
    return Assigned(declared, assign(declared.experiment, key or call.lot), bool(key))


def drawn(call: GenerateCall, lot: str) -> GenerateCall:
    """The call with the draw that stands for its session, which it keeps wherever it moves."""
    return call if call.lot or call.session or call.share.client else replace(call, lot=lot)


def bare_name(selection: AdapterSelection) -> str | None:
    """The name that a request asks for and nothing else."""
    if isinstance(selection, UseCaseRef):
        return None if selection.weights else selection.name
    if len(selection) != 1:
        return None
    ref = selection[0]
    return ref.name if ref.revision is None and ref.weight == 1.0 else None


def refuse_parts(selection: AdapterSelection, directory: AdapterDirectory) -> None:
    """Raises RequestInvalid for more than its name said of what is an experiment and nothing
    else."""
    names = [selection.name] if isinstance(selection, UseCaseRef) else [r.name for r in selection]
    for name in names:
        if directory.experiment(name) is not None and not _is_more(name, directory):
            raise RequestInvalid(
                f"{name} is an experiment: it takes no weight, no revision and no place in a mix; "
                "ask for its name alone, or for an adapter of one of its arms"
            )


def refuse_embedding(selection: AdapterSelection, directory: AdapterDirectory) -> None:
    """Raises RequestInvalid: vectors of different arms cannot be compared with one another."""
    name = bare_name(selection)
    if name is None:
        refuse_parts(selection, directory)
    elif directory.experiment(name) is not None:
        raise RequestInvalid(
            f"{name} is an experiment, and vectors of its arms cannot be compared; name an adapter "
            "with its revision, as NAME@REVISION"
        )


def _is_more(name: str, directory: AdapterDirectory) -> bool:
    """Whether an adapter or a use case has the name too."""
    try:
        directory.alias(name)
    except NotFound:
        return any(u.name == name for u in directory.use_cases())
    return True
