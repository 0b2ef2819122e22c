"""What an answer offers: one table of outputs, for metadata and responses alike, and which of them
a request wants. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from remora_agent.serving.kserve.parameters import refuse_parameters
from remora_contract.errors import RequestInvalid, Unsupported

TEXT_OUTPUT = "text_output"
NUM_OUTPUT_TOKENS = "num_output_tokens"


@dataclass(frozen=True)
class Output:
    name: str
    datatype: str
    many: bool = False  # any number of values; else exactly one


OUTPUTS = {
    o.name: o
    for o in (
        Output(TEXT_OUTPUT, "BYTES"),
        Output("finish_reason", "BYTES"),
        Output("num_input_tokens", "UINT32"),
        Output(NUM_OUTPUT_TOKENS, "UINT32"),
        Output("num_cached_tokens", "UINT32"),
        Output("queue_s", "FP32"),
        Output("prefill_s", "FP32"),
        Output("decode_s", "FP32"),
        Output("time_to_first_token_s", "FP32"),
        Output("bundle_digest", "BYTES"),
        Output("adapter_digests", "BYTES", many=True),
    )
}
# Flags that ask for an output, or leave it out.
_FLAGS = {
    "return_finish_reason": "finish_reason",
    "return_num_input_tokens": "num_input_tokens",
    "return_num_output_tokens": NUM_OUTPUT_TOKENS,
}
# Flags for what nothing here computes; false is what happens anyway.
_NOT_OFFERED = {
    "return_log_probs": "cum_log_probs and output_log_probs are not offered",
    "return_logprobs": "logprobs are not offered",
    "return_cumulative_logprob": "cumulative_logprob is not offered",
    "return_context_logits": "context_logits are not offered",
    "return_generation_logits": "generation_logits are not offered",
    "return_perf_metrics": "ask for queue_s, prefill_s, decode_s or time_to_first_token_s instead",
}


def wanted_outputs(requested: Any, values: Mapping[str, Any]) -> tuple[str, ...]:
    """`requested`: the request's list, empty for all; `values`: its inputs by name. In the table's
    order. Raises Unsupported for an output that is not offered, RequestInvalid."""
    for flag, why in _NOT_OFFERED.items():
        if values.get(flag):
            raise Unsupported(f"{flag}: {why}")
    wanted: set[str] = set()
    for output in requested:
        if output.name not in OUTPUTS:
            raise Unsupported(
                f"output {output.name[:80]!r} is not offered; there are {', '.join(OUTPUTS)}"
            )
        refuse_parameters(output.parameters, f"output {output.name}")
        wanted.add(output.name)
    wanted = wanted or set(OUTPUTS)
    for flag, name in _FLAGS.items():
        if values.get(flag) is False and len(requested) and name in wanted:
            raise RequestInvalid(f"{flag} is false and output {name} is requested")
        if flag in values:
            wanted = wanted | {name} if values[flag] else wanted - {name}
    return tuple(name for name in OUTPUTS if name in wanted)
