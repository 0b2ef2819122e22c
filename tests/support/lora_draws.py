"""Random LoraConfigs over the fields of the installed PEFT, for tests that hold our answers to its.

    config = draw(random.Random(seed), modules)

`modules` are the names of a model's modules. Every field is drawn from values that somebody could
train with; what PEFT itself refuses, it refuses when the adapter is made. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

Config = dict[str, Any]

_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")
_LINEAR += ("gate_proj", "up_proj", "down_proj", "gate_up_proj")
_STACKED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_PLAIN_INITS = (True, False, "gaussian", "orthogonal")
_OTHER_INITS = ("pissa", "pissa_niter_2", "olora", "mica")


def draw(rng: Random, modules: Sequence[str]) -> Config:
    """A config as keyword arguments of LoraConfig."""
    linear = [m for m in modules if m.rpartition(".")[2] in _LINEAR and ".experts." not in m]
    config: Config = {
        "r": rng.randint(1, 6),
        "lora_alpha": rng.choice([1, 3, 8, 16, 0.5]),
        "target_modules": _targets(rng, linear),
        "use_rslora": rng.random() < 0.3,
        "lora_dropout": rng.choice([0.0, 0.1]),
    }
    for field, values in (("rank_pattern", range(1, 9)), ("alpha_pattern", (1, 5, 24, 0.25))):
        if rng.random() < 0.4:
            config[field] = {p: rng.choice(list(values)) for p in _patterns(rng, linear)}
    _which_layers(rng, linear, config)
    _what_kind(rng, config)
    _beside(rng, config, stacked=any(m.endswith(".experts") for m in modules))
    return config


def _targets(rng: Random, linear: Sequence[str]) -> str | list[str]:
    suffixes = sorted({m.rpartition(".")[2] for m in linear})
    some = rng.sample(suffixes, rng.randint(1, len(suffixes)))
    kind = rng.random()
    if kind < 0.15:
        return "all-linear"
    if kind < 0.3:
        return rf".*\.({'|'.join(some)})"
    if kind < 0.4:
        return rf"model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(some)})"
    if kind < 0.5:
        return rng.sample(list(linear), rng.randint(1, len(linear)))
    if kind < 0.65:
        return some + rng.choice([["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
    if kind < 0.7:
        return [f"layers.1.{rng.choice(linear).split('.', 3)[3]}", *some[:1]]
    return some


def _patterns(rng: Random, linear: Sequence[str]) -> list[str]:
    module = rng.choice(linear)
    leaf = module.rpartition(".")[2]
    choices = [
        leaf,
        module,
        f"^{module.replace('.', chr(92) + '.')}",
        rf".*\.{leaf}",
        r"layers\.1\..*",
        r"layers\.[0-9]\.self_attn\.(q|o|qkv)_proj",
        "embed_tokens",
        "lm_head",
        leaf[:-2],  # the end of no name
        rf"(?<!x){leaf}",
    ]
    return rng.sample(choices, rng.randint(1, 3))


def _which_layers(rng: Random, linear: Sequence[str], config: Config) -> None:
    if rng.random() < 0.2:
        leaf = rng.choice(linear).rpartition(".")[2]
        config["exclude_modules"] = rng.choice(
            [[leaf], rf".*layers\.0\..*{leaf}", [rng.choice(linear)], "lm_head"]
        )
    if rng.random() < 0.2 and not isinstance(config["target_modules"], str):
        config["layers_to_transform"] = rng.choice([0, [1], [0, 1], [1, 7], []])
        if rng.random() < 0.5:
            config["layers_pattern"] = rng.choice(["layers", ["layers", "h"], ["blocks"], []])


def _what_kind(rng: Random, config: Config) -> None:
    if rng.random() < 0.25:
        config["use_dora"] = True
    if rng.random() < 0.15:
        config["lora_bias"] = True
    if rng.random() < 0.25:
        config["bias"] = rng.choice(["all", "lora_only"])
    if rng.random() < 0.3:
        inits = _PLAIN_INITS if rng.random() < 0.7 else _OTHER_INITS
        config["init_lora_weights"] = rng.choice(inits)
    if rng.random() < 0.1:
        config["fan_in_fan_out"] = True


def _beside(rng: Random, config: Config, *, stacked: bool) -> None:
    if rng.random() < 0.15:
        config["modules_to_save"] = rng.choice([["norm"], ["lm_head"], ["embed_tokens"]])
    if rng.random() < 0.2:
        each = {"embed_tokens": [5], "lm_head": [9]}
        some = [[5, 200], {"embed_tokens": [7]}, {"lm_head": [5]}, each]
        config["trainable_token_indices"] = rng.choice(some)
    if rng.random() < (0.5 if stacked else 0.1):
        some = _STACKED if stacked else ("q_proj.weight", "o_proj.weight")
        config["target_parameters"] = rng.sample(some, rng.randint(1, 2))
        config["lora_dropout"] = 0.0  # PEFT has none there, nor DoRA and a bias
        config.pop("use_dora", None)
        config.pop("lora_bias", None)
        if rng.random() < 0.3:
            config["target_modules"] = []
    if rng.random() < 0.15:
        config["ensure_weight_tying"] = True
    if rng.random() < 0.06:
        config["alora_invocation_tokens"] = rng.choice([[3, 4], [9]])
    if rng.random() < 0.04:
        config["layer_replication"] = [[0, 2], [1, 2]]
