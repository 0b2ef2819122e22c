"""What a request may say: one table of inputs, for metadata, tensors, parameters and JSON alike.

Names are those of Triton's TensorRT-LLM and vLLM backends. Pure data and conversions; what the
values mean stands in `request`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from remora_agent.serving.kserve.tensors import Tensor
from remora_contract.errors import RequestInvalid, Unsupported


class Kind(Enum):
    """Of an input's values, with the datatypes that may carry them."""

    INTEGER = ("INT32", "INT64", "UINT32", "UINT64")
    NUMBER = ("FP32", "FP64")
    FLAG = ("BOOL",)
    TEXT = ("BYTES",)


@dataclass(frozen=True)
class Input:
    name: str
    kind: Kind
    datatype: str  # as the model's metadata has it
    many: bool = False  # any number of values; else exactly one
    required: bool = False


def _integer(name: str, datatype: str = "INT32") -> Input:
    return Input(name, Kind.INTEGER, datatype)


def _number(name: str, *, many: bool = False) -> Input:
    return Input(name, Kind.NUMBER, "FP32", many)


def _flag(name: str) -> Input:
    return Input(name, Kind.FLAG, "BOOL")


def _text(name: str, *, many: bool = False, required: bool = False) -> Input:
    return Input(name, Kind.TEXT, "BYTES", many, required)


TEXT_INPUT = "text_input"
SAMPLING_PARAMETERS = "sampling_parameters"
INPUTS = {
    i.name: i
    for i in (
        _text(TEXT_INPUT, required=True),
        _flag("stream"),
        _integer("max_tokens"),
        _integer("min_tokens"),
        _text("stop_words", many=True),
        _text("bad_words", many=True),
        _integer("end_id"),
        _integer("pad_id"),
        _flag("ignore_eos"),
        _number("temperature"),
        _integer("top_k"),
        _number("top_p"),
        _number("min_p"),
        _integer("seed", "UINT64"),
        _number("repetition_penalty"),
        _number("presence_penalty"),
        _number("frequency_penalty"),
        _number("length_penalty"),
        _integer("beam_width"),
        _integer("num_return_sequences"),
        _text(SAMPLING_PARAMETERS),
        _text("guided_decoding_guide_type"),
        _text("guided_decoding_guide"),
        _text("adapter", many=True),
        _number("adapter_weight", many=True),
        _text("lora_name"),
        _text("use_case"),
        _text("client"),
        _text("cache_salt"),
        _text("session"),
        _flag("exclude_input_in_output"),
        _flag("return_finish_reason"),
        _flag("return_num_input_tokens"),
        _flag("return_num_output_tokens"),
        _flag("return_log_probs"),
        _flag("return_logprobs"),
        _flag("return_cumulative_logprob"),
        _flag("return_context_logits"),
        _flag("return_generation_logits"),
        _flag("return_perf_metrics"),
    )
}
# Older names of the same things.
ALIASES = {"min_length": "min_tokens", "random_seed": "seed"}
# Inputs of other servers that nothing here computes, and what to do instead.
REFUSED = {
    "lora_task_id": "name the adapter with the input adapter, or as model BASE:ADAPTER",
    "lora_weights": "register the adapter on the device, then name it with the input adapter",
    "lora_config": "register the adapter on the device, then name it with the input adapter",
    "decoder_text_input": "the models here have no encoder",
    "image": "the models here read text",
    "image_input": "the models here read text",
    "prompt_embedding_table": "give text",
    "prompt_table_extra_id": "give text",
    "prompt_vocab_size": "give text",
    "embedding_bias_words": f"give logit_bias in {SAMPLING_PARAMETERS}",
    "embedding_bias_weights": f"give logit_bias in {SAMPLING_PARAMETERS}",
    "embedding_request": "this call generates text",
    "num_draft_tokens": "the agent speculates by itself",
    "use_draft_logits": "the agent speculates by itself",
    "early_stopping": "there is no beam search",
}


def canonical(name: str) -> str:
    return ALIASES.get(name, name)


def find_input(name: str, what: str) -> Input:
    """`what`: input or parameter. Raises Unsupported, RequestInvalid for a name nobody knows."""
    if name in REFUSED:
        raise Unsupported(f"{what} {name}: not supported; {REFUSED[name]}")
    found = INPUTS.get(canonical(name))
    if found is None:
        raise RequestInvalid(
            f"{what} {name[:80]!r} is unknown; the model's metadata lists what there is"
        )
    return found


def tensor_value(tensor: Tensor) -> Any:
    """The tensor as its input wants it: a bool, int, float or str, or a tuple of them. Raises
    RequestInvalid, Unsupported naming the input."""
    wanted = find_input(tensor.name, "input")
    where = f"input {tensor.name}"
    if tensor.datatype not in wanted.kind.value:
        raise RequestInvalid(
            f"{where}: datatype {tensor.datatype}; it takes {' or '.join(wanted.kind.value)}"
        )
    if len(tensor.shape) == 2 and tensor.shape[0] != 1:
        raise RequestInvalid(
            f"{where}: a batch of {tensor.shape[0]}; send one prompt in a request, several "
            "requests are computed together anyway"
        )
    values = tensor.values
    if wanted.kind is Kind.TEXT:
        values = tuple(_decoded(value, where) for value in values)
    if wanted.many:
        return values
    if len(values) != 1:
        raise RequestInvalid(
            f"{where}: shape {list(tensor.shape)}; it takes one value, shape [1] or [1, 1]"
        )
    return values[0]


def _decoded(value: bytes, where: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as e:
        raise RequestInvalid(f"{where} is not valid UTF-8: {e.reason} at byte {e.start}") from e
