"""remora.inference.v1 messages <-> the agent's own words, for generation. Pure; no field is lost:
each is carried over or refused by name, and fields this version does not know are refused too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf.message import Message as ProtoMessage
from google.protobuf.unknown_fields import UnknownFieldSet

from remora_agent.runtime import api
from remora_agent.serving import tool_wire
from remora_agent.serving.call import (
    AdapterSelection,
    ChatPrompt,
    GenerateCall,
    Message,
    PromptInput,
    TextPrompt,
    TokenPrompt,
    UseCaseRef,
)
from remora_agent.serving.chat_prompt import MAX_TEMPLATE_ARGUMENTS, check_template_arguments
from remora_agent.serving.event_stream import StreamEvent
from remora_agent.serving.json_text import json_table
from remora_agent.serving.limits import check_call, check_prompt
from remora_contract.errors import RequestInvalid, Unsupported
from remora_contract.release import WeightedName
from remora_protos.inference.v1 import inference_pb2 as pb

_REASONS = {
    api.FinishReason.STOP: pb.FINISH_REASON_STOP,
    api.FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    api.FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
}


def generate_call(request: pb.GenerateRequest) -> GenerateCall:
    """Raises RequestInvalid, DocumentInvalid (a name), Unsupported (an unknown field)."""
    refuse_unknown_fields(request)
    kind = request.WhichOneof("input")
    if kind is None:
        raise RequestInvalid("input: set one of text, chat, token_ids")
    prompt: PromptInput
    if kind == "text":
        prompt = TextPrompt(request.text)
    elif kind == "chat":
        prompt = _chat(request.chat)
    else:
        prompt = TokenPrompt(tuple(request.token_ids.ids))
    call = GenerateCall(
        prompt=prompt,
        selection=_selection(request),
        sampling=_sampling(request.sampling),
        stopping=_stopping(request.stopping),
        request_id=request.request_id or None,
        constraint=_constraint(request.constraint) if request.HasField("constraint") else None,
        share=api.Share(request.priority, request.client, request.cache_salt),
        scoring=_scoring(request),
        n=request.n or 1,
        echo=request.echo,
        session=request.session,
    )
    return check_call(call)


def tokenize_prompt(request: pb.TokenizeRequest) -> TextPrompt | ChatPrompt:
    """Raises RequestInvalid, Unsupported."""
    refuse_unknown_fields(request)
    kind = request.WhichOneof("input")
    if kind is None:
        raise RequestInvalid("input: set one of text, chat")
    if kind == "text":
        add = request.add_special_tokens if request.HasField("add_special_tokens") else True
        return TextPrompt(request.text, add)
    if request.HasField("add_special_tokens"):
        raise RequestInvalid(
            "add_special_tokens goes with text; a chat template writes its own special tokens"
        )
    chat = _chat(request.chat)
    check_prompt(chat)
    return chat


def refuse_unknown_fields(message: ProtoMessage) -> None:
    """Raises Unsupported: a field of a newer protocol must not be dropped in silence."""
    unknown = [field.field_number for field in UnknownFieldSet(message)]
    if unknown:
        raise Unsupported(
            f"{message.DESCRIPTOR.name}: this agent does not know field number "
            f"{', '.join(map(str, sorted(set(unknown))))}; update the agent or leave it out"
        )
    for field, value in message.ListFields():
        for part in _parts(field, value):
            refuse_unknown_fields(part)


def _parts(field: Any, value: Any) -> Iterable[Any]:
    """The messages within a field."""
    if field.message_type is None:
        return ()
    if not field.message_type.GetOptions().map_entry:
        return [value] if isinstance(value, ProtoMessage) else value
    of_values = field.message_type.fields_by_name["value"].message_type
    return () if of_values is None else value.values()


def adapter_ref(adapter: pb.WeightedAdapter) -> api.AdapterRef:
    return api.AdapterRef(
        name=adapter.name,
        revision=adapter.revision or None,
        weight=adapter.weight if adapter.HasField("weight") else 1.0,
    )


def _chat(chat: pb.Chat) -> ChatPrompt:
    add = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
    return ChatPrompt(
        messages=tuple(_message(m, f"chat.messages[{i}]") for i, m in enumerate(chat.messages)),
        add_generation_prompt=add,
        arguments=template_arguments(chat.template_arguments_json),
        tools=tool_wire.objects(chat.tools_json, "chat.tools_json"),
        tool_choice=chat.tool_choice,
    )


def _message(message: pb.ChatMessage, where: str) -> Message:
    calls = tool_wire.objects(message.tool_calls_json, f"{where}.tool_calls_json")
    return Message(message.role, message.content, calls, message.tool_call_id, message.name)


def template_arguments(text: str) -> Mapping[str, Any]:
    """Extra template variables from JSON text; empty text is none. Raises RequestInvalid."""
    if not text:
        return {}
    where = "chat.template_arguments_json"
    if len(text) > MAX_TEMPLATE_ARGUMENTS:
        raise RequestInvalid(f"{where}: at most {MAX_TEMPLATE_ARGUMENTS} characters")
    return check_template_arguments(json_table(text, where), where)


def _selection(request: pb.GenerateRequest) -> AdapterSelection:
    kind = request.WhichOneof("adapter_selection")
    if kind == "use_case":
        return UseCaseRef(request.use_case, tuple(map(_override, request.use_case_weights)))
    if request.use_case_weights:
        raise RequestInvalid(
            "use_case_weights: they go with use_case; a mix has its weights in adapters"
        )
    if kind != "adapters":
        return ()
    if not request.adapters.adapters:
        raise RequestInvalid("adapters: the mix is empty; name an adapter or select none")
    return tuple(adapter_ref(a) for a in request.adapters.adapters)


def _override(adapter: pb.WeightedAdapter) -> WeightedName:
    if adapter.revision:
        raise RequestInvalid(
            f"use_case_weights: a use case follows the alias of {adapter.name}; leave the "
            "revision out"
        )
    if not adapter.HasField("weight"):
        raise RequestInvalid(f"use_case_weights: give {adapter.name[:80]!r} a weight")
    return WeightedName(adapter.name, adapter.weight)


def _sampling(sampling: pb.Sampling) -> api.SamplingOverrides:
    return api.SamplingOverrides(
        temperature=_set(sampling, "temperature"),
        top_k=_set(sampling, "top_k"),
        top_p=_set(sampling, "top_p"),
        seed=_set(sampling, "seed"),
        min_p=_set(sampling, "min_p"),
        repetition_penalty=_set(sampling, "repetition_penalty"),
        presence_penalty=_set(sampling, "presence_penalty"),
        frequency_penalty=_set(sampling, "frequency_penalty"),
        logit_bias=tuple(sorted(sampling.logit_bias.items())),
    )


def _stopping(stopping: pb.Stopping) -> api.StoppingOverrides:
    return api.StoppingOverrides(
        max_tokens=_set(stopping, "max_tokens"),
        stop=tuple(stopping.stop),
        stop_token_ids=tuple(stopping.stop_token_ids),
        ignore_eos=stopping.ignore_eos,
        min_tokens=_set(stopping, "min_tokens"),
    )


def _scoring(request: pb.GenerateRequest) -> api.Scoring:
    return api.Scoring(
        request.logprobs.top if request.HasField("logprobs") else None,
        request.prompt_logprobs.top if request.HasField("prompt_logprobs") else None,
    )


def _constraint(constraint: pb.Constraint) -> api.Constraint:
    kind = constraint.WhichOneof("grammar")
    if kind is None:
        raise RequestInvalid(
            "constraint: set one of json_schema, json_object, regex, lark and choice"
        )
    if kind == "choice":
        return api.Constraint(api.ConstraintKind.CHOICE, options=tuple(constraint.choice.options))
    if kind == "json_object":
        if not constraint.json_object:
            raise RequestInvalid("constraint.json_object is false; leave the constraint out")
        return api.Constraint(api.ConstraintKind.JSON_OBJECT)
    return api.Constraint(api.ConstraintKind(kind), getattr(constraint, kind))


def _set(message: ProtoMessage, name: str) -> Any:
    """The field's value; None when it is unset."""
    return getattr(message, name) if message.HasField(name) else None


def token_logprob(scored: api.TokenLogprob) -> pb.TokenLogprob:
    top = [pb.RankedToken(token_id=token, logprob=value) for token, value in scored.top]
    return pb.TokenLogprob(token_id=scored.token_id, logprob=scored.logprob, top=top)


def event(event: StreamEvent, choice: int = 0) -> pb.GenerateEvent:
    made = _event(event)
    made.choice = choice
    return made


def _event(event: StreamEvent) -> pb.GenerateEvent:
    if isinstance(event, api.Accepted):
        accepted = pb.Accepted(request_id=event.request_id, provenance=provenance(event.provenance))
        return pb.GenerateEvent(accepted=accepted)
    if isinstance(event, api.PromptScored):
        scored = pb.PromptLogprobs(tokens=map(token_logprob, event.logprobs))
        return pb.GenerateEvent(prompt=scored)
    if isinstance(event, api.Delta):
        logprobs = map(token_logprob, event.logprobs)
        delta = pb.TextDelta(text=event.text, token_ids=event.token_ids, logprobs=logprobs)
        return pb.GenerateEvent(delta=delta)
    return pb.GenerateEvent(finished=finished(event))


def finished(event: api.Finished) -> pb.Finished:
    usage, timings = event.usage, event.timings
    return pb.Finished(
        finish_reason=_REASONS[event.reason],
        usage=pb.Usage(
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            completion_tokens=usage.completion_tokens,
        ),
        timings=pb.Timings(
            queue_s=timings.queue_s,
            prefill_s=timings.prefill_s,
            decode_s=timings.decode_s,
            time_to_first_token_s=timings.time_to_first_token_s,
        ),
        provenance=provenance(event.provenance),
        stop_match=event.stop_match,
        tool_calls=map(tool_wire.tool_call, event.tool_calls),
    )


def provenance(provenance: api.Provenance) -> pb.Provenance:
    arm = provenance.arm
    return pb.Provenance(
        experiment="" if arm is None else arm.experiment,
        arm="" if arm is None else arm.name,
        bundle_digest=provenance.bundle_digest,
        engine_digest=provenance.engine_digest,
        adapters=[
            pb.AnsweringAdapter(
                name=a.name,
                revision=a.revision,
                digest=a.digest,
                weight=a.weight,
                active_from=a.active_from or 0,
                not_invoked=a.active_from is None,
            )
            for a in provenance.adapters
        ],
    )
