"""Which adapters a `model` name means, and the names that a model answers to. Pure.

    <base>              the base model, also <base>:
    <base>:<adapter>    one adapter, also <base>:<adapter>@<revision>
    <adapter>           the same, also <adapter>@<revision>
    <use case>          a use case, also use_case:<use case>
    <experiment>        an experiment's arm for the session, also <base>:<experiment>

An experiment has its name before an adapter or a use case of the same name. Any other name with two
meanings is refused; the longer forms tell them apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from remora_agent.bank.directory import AdapterDirectory
from remora_agent.runtime.api import AdapterRef
from remora_agent.serving.call import AdapterSelection, UseCaseRef
from remora_agent.serving.limits import named_adapter
from remora_agent.serving.openai.errors import FieldInvalid, ModelUnknown
from remora_agent.serving.openai.fields import Fields, one_of
from remora_contract.errors import NotFound, RequestInvalid
from remora_contract.release import MAX_WEIGHT, WeightedName

_MAX_MODEL_CHARS = 512
USE_CASE = "use_case:"


@dataclass(frozen=True)
class ModelChoice:
    """As the request says it; names are settled once the model is at hand."""

    model: str
    use_case: str | None = None
    weights: Mapping[str, float] = field(default_factory=dict)  # of the use case's adapters
    adapters: Mapping[str, float] = field(default_factory=dict)  # a mix of one's own


def model_choice(fields: Fields) -> ModelChoice:
    """`model`, and Remora's fields beside it. Raises FieldInvalid."""
    model = fields.text("model", _MAX_MODEL_CHARS)
    if not model:
        raise FieldInvalid("model: say which; GET /v1/models lists them", "model")
    one_of(fields, ("use_case", "adapters"))
    use_case = fields.text("use_case", _MAX_MODEL_CHARS)
    return ModelChoice(
        model, use_case, _weights(fields, "use_case_weights"), _weights(fields, "adapters")
    )


def _weights(fields: Fields, name: str) -> dict[str, float]:
    given = fields.table(name) or {}
    inner = Fields(given, name)
    weights = {}
    for key in given:
        weight = inner.number(key, -MAX_WEIGHT, MAX_WEIGHT)
        if weight is None:  # an adapter must not be dropped in silence
            raise inner.wrong(key, "a number", None)
        weights[key] = weight
    return weights


def select(choice: ModelChoice, base: str, directory: AdapterDirectory) -> AdapterSelection:
    """Raises ModelUnknown, FieldInvalid (a name with two meanings, fields that contradict)."""
    meaning = meaning_of(choice.model, base, directory)
    if choice.adapters:
        if meaning != ():
            raise FieldInvalid("adapters goes with the base model's name as model", "adapters")
        return tuple(_mixed(name, weight) for name, weight in choice.adapters.items())
    if choice.use_case is not None:
        if meaning not in ((), UseCaseRef(choice.use_case)):
            raise FieldInvalid("use_case goes with the base model's name as model", "use_case")
        meaning = UseCaseRef(choice.use_case)
    if not choice.weights:
        return meaning
    if not isinstance(meaning, UseCaseRef):
        raise FieldInvalid("use_case_weights goes with a use case", "use_case_weights")
    weights = tuple(WeightedName(name, weight) for name, weight in choice.weights.items())
    return UseCaseRef(meaning.name, weights)


def meaning_of(name: str, base: str, directory: AdapterDirectory) -> AdapterSelection:
    """Raises ModelUnknown, FieldInvalid."""
    found = _meanings(name, base, directory)
    if not found:
        raise ModelUnknown(
            f"the model {name[:80]!r} does not exist; GET /v1/models lists those that do"
        )
    if len(found) > 1:
        raise FieldInvalid(
            f"model {name[:80]!r} means several things; say one of {', '.join(found)}", "model"
        )
    return next(iter(found.values()))


def listed_names(base: str, directory: AdapterDirectory) -> dict[str, AdapterSelection]:
    """The shortest name that means one thing, of each: base, adapters, use cases."""
    running = [declared.experiment.name for declared in directory.experiments()]
    adapters = [a.name for a in directory.aliases() if a.name not in running]
    use_cases = [u.name for u in directory.use_cases() if u.name not in running] + running
    once = [n for n, times in Counter((base, *adapters, *use_cases)).items() if times == 1]
    alone = set(once)
    names: dict[str, AdapterSelection] = {base if base in alone else f"{base}:": ()}
    for name in adapters:
        names[name if name in alone else f"{base}:{name}"] = (AdapterRef(name),)
    for name in use_cases:
        names[name if name in alone else USE_CASE + name] = UseCaseRef(name)
    return names


def _meanings(name: str, base: str, directory: AdapterDirectory) -> dict[str, AdapterSelection]:
    """By the name that means this alone."""
    found: dict[str, AdapterSelection] = {}
    adapter, use_case = name.removeprefix(f"{base}:"), name.removeprefix(USE_CASE)
    for experiment in (adapter, use_case):
        if name != base and directory.experiment(experiment) is not None:
            return {name: UseCaseRef(experiment)}
    if name in (base, f"{base}:"):
        found[f"{base}:"] = ()
    with suppress(NotFound, RequestInvalid):  # no such adapter, or no name of one
        ref = named_adapter(adapter)
        directory.resolve(ref.name, ref.revision)
        found[f"{base}:{adapter}"] = (ref,)
    with suppress(NotFound):
        found[USE_CASE + use_case] = UseCaseRef(directory.use_case(use_case).name)
    return found


def _mixed(text: str, weight: float) -> AdapterRef:
    try:
        return named_adapter(text, weight)
    except RequestInvalid as e:
        raise FieldInvalid(f"adapters: {e}", "adapters") from e
