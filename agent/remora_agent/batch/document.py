"""The batch file: the input format of TensorRT Edge-LLM's `llm_inference`, read strictly.

Every field is honoured or refused by name. Pure: bytes in, frozen data out; opens no file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from remora_agent.batch.written import written_biases, written_constraint
from remora_agent.runtime.api import (
    AdapterRef,
    Constraint,
    SamplingOverrides,
    Scoring,
    StoppingOverrides,
)
from remora_agent.serving.call import (
    AdapterSelection,
    ChatPrompt,
    GenerateCall,
    Message,
    TextPrompt,
    UseCaseRef,
)
from remora_agent.serving.limits import check_call
from remora_contract.artifact import check_name
from remora_contract.errors import DocumentInvalid, Unsupported
from remora_contract.release import ReleaseUseCase, WeightedName, check_use_cases
from remora_contract.strict import parse
from remora_contract.use_case_forms import written_use_cases

MAX_INPUT_BYTES = 256 << 20
MAX_REQUESTS = 100_000
MAX_BATCH = 4096

# Known to Edge-LLM and not carried out here. Refused rather than dropped.
_UNSUPPORTED_TOP = {
    "embodiment_id": "vision-language-action models",
    "action_batch_size": "vision-language-action models",
}
_UNSUPPORTED_REQUEST = {
    "guided_decoding": "Edge-LLM's form of it; write it as constraint",
    "ego_history_xyz_npy": "trajectory input",
    "ego_history_rot_npy": "trajectory input",
    "predict_yaw": "trajectory input",
    "traj_token_offset": "trajectory input",
    "robot_state": "robot state input",
    "embodiment_id": "vision-language-action models",
    "past_trajectory": "trajectory input",
}
_TEXT = "text"


@dataclass(frozen=True)
class BatchRequest:
    messages: tuple[Message, ...]
    lora_name: str = ""  # empty: the base model alone, unless one of the next two is set
    stop: tuple[str, ...] = ()
    adapters: tuple[WeightedName, ...] = ()
    use_case: UseCaseRef | None = None
    constraint: Constraint | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    disable_spec_decode: bool = False

    @property
    def selection(self) -> AdapterSelection:
        if self.use_case is not None:
            return self.use_case
        refs = tuple(AdapterRef(a.name, None, a.weight) for a in self.adapters)
        return refs or ((AdapterRef(self.lora_name),) if self.lora_name else ())


@dataclass(frozen=True)
class BatchSettings:
    """What holds for the whole file. Defaults are Edge-LLM's."""

    batch_size: int = 1
    temperature: float = 1.0
    top_p: float = 0.8
    top_k: int = 50
    max_generate_length: int = 256
    apply_chat_template: bool = True
    add_generation_prompt: bool = True
    enable_thinking: bool = False
    available_lora_weights: dict[str, str] = field(default_factory=dict)
    # Beyond Edge-LLM; None: the bundle's own default, else none of it.
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    min_tokens: int | None = None
    logprobs: int | None = None  # of that many of the likeliest tokens too


@dataclass(frozen=True)
class Names:
    """What requests may name, brought by the file or by the command line."""

    adapters: frozenset[str] = frozenset()
    use_cases: tuple[ReleaseUseCase, ...] = ()


@dataclass(frozen=True)
class BatchDocument:
    settings: BatchSettings
    requests: tuple[BatchRequest, ...]
    use_cases: tuple[ReleaseUseCase, ...] = ()  # the file's own

    @property
    def drafts(self) -> bool:
        """Whether tokens may be guessed ahead: not in a file of which one request forbids it."""
        return not any(r.disable_spec_decode for r in self.requests)

    def overriding(self, **settings: float | int | None) -> BatchDocument:
        """With these settings in place of the file's; None leaves one as it is."""
        given: dict[str, Any] = {
            name: value for name, value in settings.items() if value is not None
        }
        return replace(self, settings=replace(self.settings, **given))


@dataclass(frozen=True)
class _Request:
    messages: tuple[dict[str, Any], ...]
    lora_name: str | None = None
    use_case: str | None = None
    weights: dict[str, float] = field(default_factory=dict)
    adapters: dict[str, float] = field(default_factory=dict)
    stop: Any = ()
    constraint: dict[str, Any] | None = None
    logit_bias: dict[str, float] = field(default_factory=dict)
    save_system_prompt_kv_cache: bool = False  # equal beginnings are kept with or without it
    disable_spec_decode: bool = False


def read_document(data: bytes, where: str, known: Names | None = None) -> BatchDocument:
    """`where` names the file in errors, `known` is what the command line brings. Raises
    DocumentInvalid, Unsupported."""
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise DocumentInvalid(f"{where}: not valid JSON: {e}") from e
    if not isinstance(raw, dict) or not isinstance(raw.get("requests"), list):
        raise DocumentInvalid(f"{where}: requests must be a list of requests")
    _refuse(raw, _UNSUPPORTED_TOP, where)
    requests = raw.pop("requests")
    own = written_use_cases(raw.pop("use_cases", {}), f"{where}: use_cases")
    if not 0 < len(requests) <= MAX_REQUESTS:
        raise DocumentInvalid(f"{where}: requests: give 1 to {MAX_REQUESTS}")
    settings = parse(BatchSettings, raw, where)
    if not 0 < settings.batch_size <= MAX_BATCH:
        raise DocumentInvalid(f"{where}: batch_size must be in 1..{MAX_BATCH}")
    names = _names(settings, own, known or Names(), where)
    read = (_request(r, f"{where}: requests[{i}]", names) for i, r in enumerate(requests))
    return BatchDocument(settings, tuple(read), own)


def _names(
    settings: BatchSettings, own: tuple[ReleaseUseCase, ...], known: Names, where: str
) -> Names:
    for name in settings.available_lora_weights:
        check_name(name, f"{where}: available_lora_weights")
        if name in known.adapters:
            raise DocumentInvalid(
                f"{where}: available_lora_weights: {name} is an adapter of --use-cases too"
            )
    adapters = known.adapters | settings.available_lora_weights.keys()
    use_cases = (*known.use_cases, *own)
    try:
        check_use_cases(use_cases, adapters)
    except ValueError as e:
        raise DocumentInvalid(f"{where}: use_cases: {e}") from e
    return Names(adapters, use_cases)


def call_of(document: BatchDocument, index: int, seed: int | None) -> GenerateCall:
    """The generation call of request `index`. Raises RequestInvalid naming what is out of range."""
    request = document.requests[index]
    settings = document.settings
    prompt: ChatPrompt | TextPrompt
    if settings.apply_chat_template:
        prompt = ChatPrompt(
            request.messages,
            settings.add_generation_prompt,
            {"enable_thinking": settings.enable_thinking},
        )
    else:
        prompt = TextPrompt("".join(m.content for m in request.messages))
    call = GenerateCall(
        prompt=prompt,
        selection=request.selection,
        sampling=SamplingOverrides(
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            seed=None if seed is None else seed + index,
            min_p=settings.min_p,
            repetition_penalty=settings.repetition_penalty,
            presence_penalty=settings.presence_penalty,
            frequency_penalty=settings.frequency_penalty,
            logit_bias=request.logit_bias,
        ),
        stopping=StoppingOverrides(
            settings.max_generate_length, stop=request.stop, min_tokens=settings.min_tokens
        ),
        request_id=f"batch-{index}",
        constraint=request.constraint,
        scoring=Scoring(settings.logprobs),
    )
    return check_call(call)


def _request(raw: object, where: str, names: Names) -> BatchRequest:
    if isinstance(raw, dict):
        _refuse(raw, _UNSUPPORTED_REQUEST, where)
    request = parse(_Request, raw, where)
    messages = tuple(_message(m, f"{where}: messages[{i}]") for i, m in enumerate(request.messages))
    name = request.lora_name or ""
    if len([given for given in (name, request.use_case, request.adapters) if given]) > 1:
        raise DocumentInvalid(f"{where}: give one of lora_name, adapters and use_case")
    if name and name not in names.adapters:
        raise DocumentInvalid(
            f"{where}: lora_name {name[:80]!r} is not in available_lora_weights "
            f"({', '.join(sorted(names.adapters)) or 'which is empty'})"
        )
    for used in request.adapters:
        if used not in names.adapters:
            raise DocumentInvalid(
                f"{where}: adapters: {used[:80]!r} is not in available_lora_weights"
            )
    mix = tuple(WeightedName(n, w) for n, w in request.adapters.items())
    use_case = _use_case(request, where, names)
    return BatchRequest(
        messages,
        name,
        _stop(request.stop, where),
        mix,
        use_case,
        None if request.constraint is None else written_constraint(request.constraint, where),
        written_biases(request.logit_bias, where),
        request.disable_spec_decode,
    )


def _use_case(request: _Request, where: str, names: Names) -> UseCaseRef | None:
    if not request.use_case:
        if request.weights:
            raise DocumentInvalid(f"{where}: weights go with use_case")
        return None
    known = {u.name: u for u in names.use_cases}
    if request.use_case not in known:
        raise DocumentInvalid(
            f"{where}: use_case {request.use_case[:80]!r} is unknown "
            f"(known: {', '.join(sorted(known)) or 'none'})"
        )
    has = {a.name for a in known[request.use_case].adapters}
    for name in request.weights:
        if name not in has:
            raise DocumentInvalid(
                f"{where}: weights: use case {request.use_case} has no adapter {name[:80]!r}"
            )
    weights = tuple(WeightedName(n, w) for n, w in request.weights.items())
    return UseCaseRef(request.use_case, weights)


def _message(raw: Mapping[str, Any], where: str) -> Message:
    if set(raw) != {"role", "content"}:
        raise DocumentInvalid(f"{where}: a message has role and content, not {sorted(raw)}")
    role, content = raw["role"], raw["content"]
    if not isinstance(role, str):
        raise DocumentInvalid(f"{where}: role must be text")
    if isinstance(content, str):
        return Message(role, content)
    if not isinstance(content, list):
        raise DocumentInvalid(f"{where}: content must be text or a list of parts")
    return Message(role, "".join(_part(p, f"{where}: content[{i}]") for i, p in enumerate(content)))


def _part(raw: object, where: str) -> str:
    if not isinstance(raw, dict) or not isinstance(raw.get("type"), str):
        raise DocumentInvalid(f"{where}: a part is a table with a type")
    if raw["type"] != _TEXT:
        raise Unsupported(f"{where}: content of type {raw['type'][:40]!r}: only text is supported")
    if set(raw) != {"type", "text"} or not isinstance(raw["text"], str):
        raise DocumentInvalid(f"{where}: a text part has type and text, not {sorted(raw)}")
    return raw["text"]


def _stop(raw: object, where: str) -> tuple[str, ...]:
    texts = [raw] if isinstance(raw, str) else raw
    if not isinstance(texts, (list, tuple)) or not all(isinstance(t, str) for t in texts):
        raise DocumentInvalid(f"{where}: stop must be text or a list of texts")
    return tuple(texts)


def _refuse(raw: Mapping[str, object], unsupported: Mapping[str, str], where: str) -> None:
    for key in raw:
        if key in unsupported:
            raise Unsupported(f"{where}: {key} is not supported ({unsupported[key]}); leave it out")
