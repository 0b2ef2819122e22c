"""Sampling a request did not ask for: the release's defaults, then the bundle's generation config.

Owns the reading of generation_config.json: every field is honoured, harmless or warned about.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remora_agent.runtime.api import SamplingParams
from remora_agent.text.files import read_json_table
from remora_contract.bundle import GENERATION_CONFIG
from remora_contract.errors import ArtifactInvalid
from remora_contract.release import SamplingDefaults

# transformers samples among 50 when a config samples and does not say how many.
_UNSAID_TOP_K = 50

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
        "trust_remote_code",
        "chat_format",
        "remove_invalid_values",
        "renormalize_logits",
    }
)
# Fields that change the tokens, with the values that leave them alone (besides null).
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "repetition_penalty": (1,),
    "encoder_repetition_penalty": (1,),
    "diversity_penalty": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "min_p": (0,),
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
    """As transformers reads it: without do_sample the answer is greedy, whatever else is set.
    Raises ArtifactInvalid for a value out of range."""
    warnings = tuple(_warnings(config))
    max_tokens = _number(config, "max_new_tokens", where, least=1)
    count = None if max_tokens is None else int(max_tokens)
    if not config.get("do_sample"):
        return GenerationDefaults(SamplingDefaults(temperature=0.0, max_tokens=count), warnings)
    temperature = _number(config, "temperature", where, least=0)
    top_k = _number(config, "top_k", where, least=0)
    top_p = _number(config, "top_p", where, least=0)
    if top_p is not None and not 0 < top_p <= 1:
        raise ArtifactInvalid(f"{where}: top_p must be above 0 and at most 1, not {top_p}")
    sampling = SamplingDefaults(
        temperature=1.0 if temperature is None else temperature,
        top_k=_UNSAID_TOP_K if top_k is None else int(top_k),
        top_p=top_p,
        max_tokens=count,
    )
    return GenerationDefaults(sampling, warnings)


def layered(first: SamplingDefaults, then: SamplingDefaults) -> SamplingDefaults:
    """`first` where it says something, else `then`."""
    return SamplingDefaults(
        temperature=_either(first.temperature, then.temperature),
        top_k=_either(first.top_k, then.top_k),
        top_p=_either(first.top_p, then.top_p),
        max_tokens=_either(first.max_tokens, then.max_tokens),
    )


def sampling_params(defaults: SamplingDefaults, seed: int | None) -> SamplingParams:
    """Greedy over the whole vocabulary where nobody says anything."""
    plain = SamplingParams()
    return SamplingParams(
        temperature=plain.temperature if defaults.temperature is None else defaults.temperature,
        top_k=plain.top_k if defaults.top_k is None else defaults.top_k,
        top_p=plain.top_p if defaults.top_p is None else defaults.top_p,
        seed=seed,
    )


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


def _number(config: Mapping[str, Any], name: str, where: str, *, least: float) -> float | None:
    value = config.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
        raise ArtifactInvalid(f"{where}: {name} must be a number from {least}, not {value!r:.60}")
    if not math.isfinite(value):
        raise ArtifactInvalid(f"{where}: {name} must be finite")
    return float(value)


def _either(first: Any, then: Any) -> Any:
    return then if first is None else first
