"""A release's names on a model: adapters registered and preloaded, then swapped all at once.

Between two requests every alias and use case changes together; a request in flight keeps the bytes
it started with. Knows no engines.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from remora_agent.bank.directory import Declared
from remora_agent.host import AssignedAdapter, Assignment
from remora_agent.runtime.adapters import UnloadMode
from remora_agent.runtime.api import AdapterRef
from remora_agent.runtime.bounds import check_sampling
from remora_agent.runtime.checks import check_adapters
from remora_agent.runtime.defaults import sampling_params
from remora_agent.runtime.model import Model, ModelAdapters
from remora_agent.runtime.options import RuntimeOptions
from remora_agent.serving.served_model import ServedModel
from remora_contract.errors import (
    Conflict,
    Exhausted,
    NotFound,
    Refused,
    RemoraError,
    RequestInvalid,
    Unavailable,
    Unsupported,
)
from remora_contract.experiments import Experiment, arm_mix
from remora_contract.release import arm_identities

log = logging.getLogger(__name__)


def adopt(model: ServedModel, old: Assignment | None, new: Assignment) -> None:
    """Makes `new` what the model's names mean; `old` is what they meant.

    On an error names mean what they meant before. Raises ArtifactInvalid, AdapterInvalid,
    Incompatible, Conflict (a revision registered with other bytes), NotFound, RequestInvalid (use
    cases or sampling defaults that no request could be answered with), Unsupported.
    """
    check_answerable(new, model.runtime.options)
    check_shadows(new, model.runtime)
    adapters = model.runtime.adapters
    added = _register(adapters, new)
    try:
        for adapter in _changed(adapters, new):
            _preload(adapters, adapter)
        _swap(model, old, new)
    except RemoraError:
        for adapter in added:
            _forget(adapters, adapter)
        raise
    for adapter in stale(old, new):
        _forget(adapters, adapter)


def check_answerable(new: Assignment, options: RuntimeOptions) -> None:
    """Raises RequestInvalid where every request that relies on the release would be refused."""
    for use_case in new.use_cases:
        mix = tuple(AdapterRef(a.name, None, a.weight) for a in use_case.adapters)
        try:
            check_adapters(mix, options)
        except RequestInvalid as e:
            raise RequestInvalid(f"use case {use_case.name} of {new.release_id}: {e}") from e
    try:
        check_sampling(sampling_params(new.sampling))
    except RequestInvalid as e:
        raise RequestInvalid(f"sampling defaults of {new.release_id}: {e}") from e
    if new.sampling.max_tokens is not None and new.sampling.max_tokens < 1:
        raise RequestInvalid(
            f"sampling defaults of {new.release_id}: max_tokens must be at least 1"
        )
    if new.sampling.min_tokens is not None and new.sampling.min_tokens < 0:
        raise RequestInvalid(
            f"sampling defaults of {new.release_id}: min_tokens must be at least 0"
        )


def check_shadows(new: Assignment, runtime: Model) -> None:
    """Raises Unsupported where a shadow could compare nothing."""
    for experiment in new.experiments:
        if experiment.shadow is not None and not runtime.scores:
            raise Unsupported(
                f"experiment {experiment.name} of {new.release_id}: a shadow needs the logprobs of "
                f"given answers, which this {runtime.status().backend} engine does not give; leave "
                "shadow out"
            )


def stale(old: Assignment | None, new: Assignment) -> list[AssignedAdapter]:
    """Revisions that the old release brought and the new one has no use for."""
    kept = {(a.name, a.revision) for a in new.adapters}
    return [a for a in (old.adapters if old else ()) if (a.name, a.revision) not in kept]


def _register(adapters: ModelAdapters, new: Assignment) -> list[AssignedAdapter]:
    """Returns what was not known before; forgets it again when one of them is refused."""
    added: list[AssignedAdapter] = []
    known = {(r.name, r.revision) for r in adapters.directory.revisions()}
    try:
        for adapter in new.adapters:
            adapters.register(adapter.name, adapter.revision, adapter.directory)
            if (adapter.name, adapter.revision) not in known:
                added.append(adapter)
    except RemoraError:
        for adapter in added:
            _forget(adapters, adapter)
        raise
    return added


def _changed(adapters: ModelAdapters, new: Assignment) -> list[AssignedAdapter]:
    """Those that no request could have brought into the bank yet, or whose name moves."""
    resident = {(i.name, i.revision) for i in adapters.list() if i.bank_bytes and i.alias_target}
    return [a for a in new.adapters if (a.name, a.revision) not in resident]


def _preload(adapters: ModelAdapters, adapter: AssignedAdapter) -> None:
    """So that the first request does not wait. A full bank is no reason to refuse the release:
    the adapter then comes in with its first request, as soon as there is room."""
    try:
        adapters.load(adapter.name, adapter.revision)
    except (Exhausted, Unavailable) as e:
        log.warning("adapter.not_preloaded", extra={"adapter": adapter.name, "why": str(e)})


def _swap(model: ServedModel, old: Assignment | None, new: Assignment) -> None:
    adapters, directory = model.runtime.adapters, model.runtime.adapters.directory
    gone = {u.name for u in (old.use_cases if old else ())} - {u.name for u in new.use_cases}
    with model.changing_names():
        for adapter in new.adapters:
            if directory.alias(adapter.name).revision != adapter.revision:
                adapters.set_alias(adapter.name, adapter.revision)
        for use_case in new.use_cases:
            directory.set_use_case(use_case.name, use_case.adapters)
        directory.set_experiments(map(declared_by(new), new.experiments))
        for name in sorted(gone):
            directory.delete_use_case(name)
        model.runtime.set_sampling_defaults(new.sampling)


def declared_by(new: Assignment) -> Callable[[Experiment], Declared]:
    """An experiment of the assignment with what its arms run."""
    digests = {a.name: a.digest for a in new.adapters}
    use_cases = {u.name: [(a.name, a.weight) for a in u.adapters] for u in new.use_cases}

    def declared(experiment: Experiment) -> Declared:
        identities = arm_identities(experiment, new.bundle_digest, digests, new.use_cases)
        mixes = {a.name: tuple(arm_mix(a, digests, use_cases)) for a in experiment.arms}
        return Declared(experiment, identities, mixes)

    return declared


def _forget(adapters: ModelAdapters, adapter: AssignedAdapter) -> None:
    """Requests that run with it end in peace. What someone else set up on it stays."""
    try:
        adapters.pin(adapter.name, adapter.revision, pinned=False)
        adapters.unload(adapter.name, adapter.revision, UnloadMode.GRACEFUL, forget=True)
    except (Conflict, NotFound, Refused, Unavailable) as e:
        log.warning("adapter.kept", extra={"adapter": adapter.name, "why": str(e)})
