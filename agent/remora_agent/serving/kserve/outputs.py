"""What an answer offers: one table of outputs, for metadata and responses alike, and which of them
a request wants. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from remora_agent.serving.kserve.parameters import refuse_parameters
from remora_contract.errors import RequestInvalid, Unsupported

TEXT_OUTPUT = "text_output"
NUM_OUTPUT_TOKENS = "num_output_tokens"
CUM_LOG_PROBS = "cum_log_probs"
CUMULATIVE_LOGPROB = "cumulative_logprob"  # the vLLM backend's name of the same
OUTPUT_LOG_PROBS = "output_log_probs"


@dataclass(frozen=True)
class Output:
    name: str
    datatype: str
    many: bool = False  # any number of values; else exactly one
    costs: bool = False  # computed only for requests that ask for it by name or flag


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
        Output("experiment", "BYTES", many=True),  # none outside experiments
        Output("arm", "BYTES", many=True),
        Output(CUM_LOG_PROBS, "FP32", costs=True),
        Output(OUTPUT_LOG_PROBS, "FP32", many=True, costs=True),
        Output(CUMULATIVE_LOGPROB, "FP32", costs=True),
    )
}
# Flags that ask for outputs, or leave them out.
_FLAGS = {
    "return_finish_reason": ("finish_reason",),
    "return_num_input_tokens": ("num_input_tokens",),
    "return_num_output_tokens": (NUM_OUTPUT_TOKENS,),
    "return_log_probs": (CUM_LOG_PROBS, OUTPUT_LOG_PROBS),
    "return_cumulative_logprob": (CUMULATIVE_LOGPROB,),
}
# Flags for what nothing here computes; false is what happens anyway.
_NOT_OFFERED = {
    "return_logprobs": "ask for output_log_probs instead",
    "return_context_logits": "context_logits are not offered",
    "return_generation_logits": "generation_logits are not offered",
    "return_perf_metrics": "ask for queue_s, prefill_s, decode_s or time_to_first_token_s instead",
}


def wanted_outputs(requested: Any, values: Mapping[str, Any]) -> tuple[str, ...]:
    """`requested`: the request's list, empty for all that cost nothing; `values`: its inputs by
    name. In the table's order. Raises Unsupported for an output that is not offered,
    RequestInvalid."""
    for flag, why in _NOT_OFFERED.items():
        if values.get(flag):
            raise Unsupported(f"{flag}: {why}")
    listed = _listed(requested)
    wanted = listed or {name for name, output in OUTPUTS.items() if not output.costs}
    for flag, names in _FLAGS.items():
        refused = listed.intersection(names) if values.get(flag) is False else set()
        if refused:
            raise RequestInvalid(f"{flag} is false and output {min(refused)} is requested")
        if flag in values:
            wanted = wanted.union(names) if values[flag] else wanted.difference(names)
    return tuple(name for name in OUTPUTS if name in wanted)


def needs_logprobs(wanted: Collection[str]) -> bool:
    return any(OUTPUTS[name].costs for name in wanted)


def _listed(requested: Any) -> set[str]:
    listed: set[str] = set()
    for output in requested:
        if output.name not in OUTPUTS:
            raise Unsupported(
                f"output {output.name[:80]!r} is not offered; there are {', '.join(OUTPUTS)}"
            )
        refuse_parameters(output.parameters, f"output {output.name}")
        listed.add(output.name)
    return listed
