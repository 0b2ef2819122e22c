"""Which shapes an engine takes: one profile for chunks of a prompt, one for a token of many rows.

    prefill   b = 1, s = 1..chunk
    decode    b = 1..rows, s = 1
    both      t_GROUP = 0..max_bank_rank x parts of the group

Of a prompt's tokens n have states and k logits (`positions`), of a decode step's each.

Pure: from the portable graph's inputs and numbers to shapes. TensorRT takes a profile that exceeds
the static cache without a word, so the numbers are checked here.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from remora_agent.engine.trt.files import Profile
from remora_contract.bundle import GraphSpec
from remora_contract.errors import ArtifactInvalid, EngineFault, RequestInvalid
from remora_contract.targets import ALL_GROUPS, PARTS, past_key
from remora_contract.trt_memory import PREFILL_TOKENS, most_logits

_TYPICAL_RANK = 16  # for which kernels are chosen

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Range:
    """What one input may be; kernels are chosen for `typical`."""

    least: Shape
    typical: Shape
    most: Shape


def profiles_of(rows: int, context: int, chunk: int = PREFILL_TOKENS) -> tuple[Profile, Profile]:
    """Prefill first. Raises RequestInvalid for a chunk of nothing."""
    if rows < 1 or context < 1 or chunk < 1:
        raise RequestInvalid(f"rows {rows}, context {context} and chunk {chunk} must be 1 or more")
    return Profile("prefill", 1, min(chunk, context)), Profile("decode", rows, 1)


def check_capacity(graph: onnx.GraphProto, spec: GraphSpec, profiles: tuple[Profile, ...]) -> None:
    """Raises ArtifactInvalid when bundle.json and graph differ, EngineFault when a profile exceeds
    the cache."""
    cache = next((v for v in graph.input if v.name == past_key(0)), None)
    if cache is None:
        raise ArtifactInvalid(f"the graph has no input {past_key(0)}; export the checkpoint again")
    held = cache.type.tensor_type.shape.dim[2].dim_value
    if held != spec.context:
        raise ArtifactInvalid(
            f"bundle.json says that the cache holds {spec.context} tokens, the graph's holds "
            f"{held}; export the checkpoint again"
        )
    for profile in profiles:
        if profile.tokens > held:
            raise EngineFault(
                f"a {profile.kind} profile of {profile.tokens} tokens exceeds the cache of {held}"
            )


def positions_of(profile: Profile, vocab: int) -> tuple[int, int]:
    """Of how many positions a step gives states and logits, at most."""
    if profile.kind == "decode":
        return profile.rows, profile.rows
    return profile.tokens, most_logits(vocab, profile.tokens)


def ranges(
    graph: onnx.GraphProto, profile: Profile, max_bank_rank: int, vocab: int
) -> dict[str, Range]:
    """By input name. Raises EngineFault for a dimension whose name says nothing."""
    sizes = {"b": (1, profile.rows, profile.rows), "s": (1, profile.tokens, profile.tokens)}
    for name, most in zip("nk", positions_of(profile, vocab), strict=True):
        # Of most prompts only the last position is asked for.
        sizes[name] = (1, 1 if profile.kind == "prefill" else most, most)
    for group in ALL_GROUPS:
        parts = len(PARTS[group])
        most = max_bank_rank * parts
        sizes[f"t_{group}"] = (0, min(_TYPICAL_RANK * parts, most), most)
    return {value.name: _range(value, sizes) for value in graph.input}


def _range(value: onnx.ValueInfoProto, sizes: dict[str, tuple[int, int, int]]) -> Range:
    dimensions = []
    for d in value.type.tensor_type.shape.dim:
        if d.dim_param and d.dim_param not in sizes:
            raise EngineFault(
                f"input {value.name} has a dimension {d.dim_param[:40]!r} that no profile knows; "
                "export the checkpoint again with this version of remora-build"
            )
        dimensions.append(sizes[d.dim_param] if d.dim_param else (d.dim_value,) * 3)
    return Range(*(tuple(d[i] for d in dimensions) for i in range(3)))
