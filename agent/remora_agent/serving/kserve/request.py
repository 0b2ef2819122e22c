"""A ModelInferRequest as a GenerateCall and what else it asks for. Pure; every input, parameter and
key is carried over or refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from remora_agent.runtime.api import (
    Constraint,
    ConstraintKind,
    SamplingOverrides,
    Scoring,
    Share,
    StoppingOverrides,
)
from remora_agent.serving.call import AdapterSelection, GenerateCall, TextPrompt, UseCaseRef
from remora_agent.serving.kserve.inputs import (
    INPUTS,
    SAMPLING_PARAMETERS,
    TEXT_INPUT,
    canonical,
    tensor_value,
)
from remora_agent.serving.kserve.outputs import needs_logprobs, wanted_outputs
from remora_agent.serving.kserve.parameters import (
    RequestParameters,
    check_input_parameters,
    request_parameters,
)
from remora_agent.serving.kserve.sampling_json import SamplingJson, parse_sampling_json
from remora_agent.serving.kserve.tensors import input_tensors
from remora_agent.serving.limits import check_call, check_request_id, named_adapter
from remora_agent.serving.wire import refuse_unknown_fields
from remora_contract.errors import RequestInvalid, Unsupported
from remora_protos.kserve.v2 import grpc_service_pb2 as pb

_GUIDES = {
    "json": ConstraintKind.JSON_OBJECT,
    "json_schema": ConstraintKind.JSON_SCHEMA,
    "regex": ConstraintKind.REGEX,
}


@dataclass(frozen=True)
class Inference:
    """`call` has no adapters yet: `selection` are those the inputs name (None: they name none), and
    the model's name may say some. Its request id is the agent's own: clients repeat theirs."""

    model_name: str
    model_version: str
    client_id: str  # goes back with every response; may be empty
    call: GenerateCall
    selection: AdapterSelection | None
    stream: bool
    outputs: tuple[str, ...]
    empty_final: bool
    timeout_s: float | None


def inference(request: pb.ModelInferRequest) -> Inference:
    """Raises RequestInvalid, Unsupported, DocumentInvalid (a name)."""
    refuse_unknown_fields(request)
    if request.id:
        check_request_id(request.id)
    raw = dict(enumerate(request.raw_input_contents))
    for i, given in enumerate(request.inputs):
        check_input_parameters(given.parameters, raw.get(i), f"input {given.name[:80]}")
    parameters = request_parameters(request.parameters)
    tensors = input_tensors(request, len(INPUTS))
    own = _joined([(t.name, tensor_value(t)) for t in tensors], parameters.values.items())
    sampling = parse_sampling_json(own.pop(SAMPLING_PARAMETERS, "{}"))
    values = _joined(own.items(), sampling.values.items())
    if TEXT_INPUT not in values:
        raise RequestInvalid(f"input {TEXT_INPUT} is missing: a BYTES tensor of shape [1]")
    _refuse_what_is_not_computed(values)
    wanted = wanted_outputs(request.outputs, values)
    scoring = Scoring(top=0) if needs_logprobs(wanted) else Scoring()
    call = replace(_call(values, sampling, parameters), scoring=scoring)
    return Inference(
        model_name=request.model_name,
        model_version=request.model_version,
        client_id=request.id,
        call=check_call(call),
        selection=_selection(values),
        stream=values.get("stream", False),
        outputs=wanted,
        empty_final=parameters.empty_final,
        timeout_s=parameters.timeout_s,
    )


def _joined(*sources: Any) -> dict[str, Any]:
    """By canonical name. Raises RequestInvalid for what is said twice."""
    joined: dict[str, Any] = {}
    for source in sources:
        for name, value in source:
            if canonical(name) in joined:
                raise RequestInvalid(
                    f"{name} is given twice, as inputs, parameters or in {SAMPLING_PARAMETERS}"
                )
            joined[canonical(name)] = value
    return joined


def _refuse_what_is_not_computed(values: Mapping[str, Any]) -> None:
    """`pad_id` is let through: nothing is padded, so it changes nothing."""
    if any(values.get("bad_words", ())):
        raise Unsupported(
            f"bad_words: not implemented; give logit_bias in {SAMPLING_PARAMETERS} or leave it out"
        )
    for name, neutral in (("beam_width", 1), ("num_return_sequences", 1), ("length_penalty", 1)):
        if values.get(name, neutral) != neutral:
            raise Unsupported(
                f"{name}: only {neutral} is supported, not {values[name]}; there is one answer to "
                "a request and no beam search"
            )


def _call(
    values: Mapping[str, Any], sampling: SamplingJson, parameters: RequestParameters
) -> GenerateCall:
    exclude_prompt = values.get("exclude_input_in_output", True)
    return GenerateCall(
        prompt=TextPrompt(values[TEXT_INPUT]),
        sampling=_sampling(values, sampling.logit_bias),
        stopping=_stopping(values, sampling.stop_token_ids),
        constraint=_constraint(values),
        echo=not exclude_prompt,
        share=Share(parameters.priority, values.get("client", ""), values.get("cache_salt", "")),
        session=values.get("session", ""),
    )


def _sampling(
    values: Mapping[str, Any], logit_bias: tuple[tuple[int, float], ...]
) -> SamplingOverrides:
    top_p = values.get("top_p")
    return SamplingOverrides(
        temperature=values.get("temperature"),
        top_k=values.get("top_k"),
        top_p=1.0 if top_p == 0 else top_p,  # 0 is the TensorRT-LLM backend's word for off
        seed=values.get("seed"),
        min_p=values.get("min_p"),
        repetition_penalty=values.get("repetition_penalty"),
        presence_penalty=values.get("presence_penalty"),
        frequency_penalty=values.get("frequency_penalty"),
        logit_bias=logit_bias,
    )


def _stopping(values: Mapping[str, Any], stop_token_ids: tuple[int, ...]) -> StoppingOverrides:
    end_id = values.get("end_id")
    if end_id is not None and end_id < 0:
        raise RequestInvalid(f"end_id must be a token, not {end_id}; to go on past it: ignore_eos")
    return StoppingOverrides(
        max_tokens=values.get("max_tokens"),
        # An empty stop word is the TensorRT-LLM backend's word for none.
        stop=tuple(word for word in values.get("stop_words", ()) if word),
        stop_token_ids=stop_token_ids if end_id is None else (*stop_token_ids, end_id),
        ignore_eos=values.get("ignore_eos", False),
        min_tokens=values.get("min_tokens"),
    )


def _constraint(values: Mapping[str, Any]) -> Constraint | None:
    kind, guide = values.get("guided_decoding_guide_type"), values.get("guided_decoding_guide")
    if kind is None and guide is None:
        return None
    if kind not in _GUIDES:
        raise RequestInvalid(
            f"guided_decoding_guide_type must be {', '.join(_GUIDES)}, not {str(kind)[:40]!r}"
        )
    constraint = Constraint(_GUIDES[kind], guide or "")
    if bool(guide) != (constraint.kind is not ConstraintKind.JSON_OBJECT):
        need = "takes no" if guide else "needs a"
        raise RequestInvalid(f"guided_decoding_guide_type {kind} {need} guided_decoding_guide")
    return constraint


def _selection(values: Mapping[str, Any]) -> AdapterSelection | None:
    given = [name for name in ("adapter", "lora_name", "use_case") if name in values]
    if len(given) > 1:
        raise RequestInvalid(f"{given[0]} and {given[1]} both choose adapters; give one of them")
    if "adapter_weight" in values and given != ["adapter"]:
        raise RequestInvalid("adapter_weight goes with adapter")
    if not given:
        return None
    if given == ["use_case"]:
        return UseCaseRef(values["use_case"])
    if given == ["lora_name"]:
        return (named_adapter(values["lora_name"]),)
    names = values["adapter"]
    weights = values.get("adapter_weight", (1.0,) * len(names))
    if not names or len(weights) != len(names):
        raise RequestInvalid(
            f"adapter names {len(names)} and adapter_weight weighs {len(weights)}; give at least "
            "one adapter, and as many weights or none"
        )
    return tuple(named_adapter(name, weight) for name, weight in zip(names, weights, strict=True))
