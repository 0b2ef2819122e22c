"""Sampling a request did not ask for: the release's defaults, then the bundle's generation config.

Owns the reading of generation_config.json: every field is honoured, harmless or warned about.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from remora_agent.runtime.api import (
    SamplingOverrides,
    SamplingParams,
    StoppingOverrides,
    StoppingParams,
)
from remora_agent.text.files import read_json_table
from remora_contract.bundle import GENERATION_CONFIG
from remora_contract.errors import ArtifactInvalid
from remora_contract.release import SamplingDefaults
from remora_contract.sampling_bounds import RANGES

# transformers samples among 50 when a config samples and does not say how many.
_UNSAID_TOP_K = 50
_GREEDY = SamplingDefaults(temperature=0.0)

# Fields that change nothing here: read elsewhere, about training, caching, returning or speed, or
# without effect unless one of the others asks for it.
_HARMLESS = frozenset(
    {
        "_from_model_config",
        "transformers_version",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "decoder_start_token_id",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "max_new_tokens",
        "max_length",
        "use_cache",
        "cache_implementation",
        "cache_config",
        "return_dict_in_generate",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "output_logits",
        "num_return_sequences",
        "early_stopping",
        "length_penalty",
        "low_memory",
        "disable_compile",
        "compile_config",
        "max_time",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "prompt_lookup_num_tokens",
        "max_matching_ngram_size",
        "assistant_early_exit",
        "assistant_lookbehind",
        "target_lookbehind",
        "is_assistant",
        "prefill_chunk_size",
        "min_p",
        "repetition_penalty",
        "min_new_tokens",
        "trust_remote_code",
        "chat_format",
        "remove_invalid_values",
        "renormalize_logits",
    }
)
# Fields that change the tokens, with the values that leave them alone (besides null).
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "encoder_repetition_penalty": (1,),
    "diversity_penalty": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "min_length": (0,),
    "top_h": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "token_healing": (False,),
}


@dataclass(frozen=True)
class GenerationDefaults:
    """None where the bundle does not say."""

    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    warnings: tuple[str, ...] = ()  # settings that are not honoured


def load_generation_defaults(bundle_directory: Path) -> GenerationDefaults:
    """Reads BUNDLE/generation_config.json; a bundle may have none. Raises ArtifactInvalid."""
    path = bundle_directory / GENERATION_CONFIG
    return parse_generation_config(read_json_table(path), str(path))


def parse_generation_config(config: Mapping[str, Any], where: str) -> GenerationDefaults:
    """As transformers reads it: without do_sample the likeliest token is taken, whatever is said
    about drawing; penalties and lengths hold for both. Raises ArtifactInvalid for a value out of
    range."""
    warnings = tuple(_warnings(config))
    max_tokens = _number(config, "max_new_tokens", where, 1)
    min_tokens = _number(config, "min_new_tokens", where, 0)
    repetition = RANGES["repetition_penalty"]
    lengths = SamplingDefaults(
        repetition_penalty=_number(
            config, "repetition_penalty", where, repetition.least, repetition.most
        ),
        max_tokens=None if max_tokens is None else int(max_tokens),
        min_tokens=None if min_tokens is None else int(min_tokens),
    )
    drawing = _drawing(config, where) if config.get("do_sample") else _GREEDY
    return GenerationDefaults(layered(drawing, lengths), warnings)


def _drawing(config: Mapping[str, Any], where: str) -> SamplingDefaults:
    temperature = _number(config, "temperature", where, 0)
    top_k = _number(config, "top_k", where, 0)
    top_p = _number(config, "top_p", where, 0, 1)
    if top_p == 0:
        raise ArtifactInvalid(f"{where}: top_p must be above 0")
    return SamplingDefaults(
        temperature=1.0 if temperature is None else temperature,
        top_k=_UNSAID_TOP_K if top_k is None else int(top_k),
        top_p=top_p,
        min_p=_number(config, "min_p", where, 0, 1),
    )


def layered(first: SamplingDefaults, then: SamplingDefaults) -> SamplingDefaults:
    """`first` where it says something, else `then`."""
    return replace(then, **{k: v for k, v in vars(first).items() if v is not None})


def sampling_params(
    defaults: SamplingDefaults, asked: SamplingOverrides | None = None
) -> SamplingParams:
    """What was `asked` over `defaults`; greedy over the whole vocabulary where neither says
    anything."""
    lengths = ("max_tokens", "min_tokens")
    said = {k: v for k, v in vars(defaults).items() if v is not None and k not in lengths}
    said |= {k: v for k, v in vars(asked or SamplingOverrides()).items() if v is not None}
    return SamplingParams(**said)


def stopping_params(
    defaults: SamplingDefaults, asked: StoppingOverrides, default_max_tokens: int
) -> StoppingParams:
    """The same for stopping. A default of min_tokens gives way to a smaller max_tokens."""
    default = default_max_tokens if defaults.max_tokens is None else defaults.max_tokens
    longest = default if asked.max_tokens is None else asked.max_tokens
    least = min(defaults.min_tokens or 0, longest) if asked.min_tokens is None else asked.min_tokens
    return StoppingParams(longest, asked.stop, asked.stop_token_ids, asked.ignore_eos, least)


def _warnings(config: Mapping[str, Any]) -> list[str]:
    found = []
    for name, value in sorted(config.items()):
        neutral = value is None or value in ([], {}) or value in _NEUTRAL.get(name, ())
        if name not in _HARMLESS and not neutral:
            found.append(
                f"{GENERATION_CONFIG}: {name} = {str(value)[:60]} is not implemented; "
                "answers differ from the checkpoint's own"
            )
    return found


def _number(
    config: Mapping[str, Any], name: str, where: str, least: float, most: float = math.inf
) -> float | None:
    value = config.get(name)
    if value is None:
        return None
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if not known or not least <= value <= most:
        raise ArtifactInvalid(
            f"{where}: {name} must be a number in {least:g}..{most:g}, not {value!r:.60}"
        )
    if not math.isfinite(value):
        raise ArtifactInvalid(f"{where}: {name} must be finite")
    return float(value)
