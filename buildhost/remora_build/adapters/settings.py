"""adapter_config.json -> LoraSettings: the fields that change the conversion, typed and checked.

Owns the document's schema; which modules it selects is `matching`, which fields there are `fields`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from remora_build.adapters.fields import CARRIED, MERGE, PLAIN_INITS
from remora_build.adapters.rules import Rules
from remora_contract.adapter import MAX_INVOCATION_TOKENS, MAX_RANK
from remora_contract.bundle import read_document
from remora_contract.errors import AdapterInvalid, Unsupported
from remora_contract.strict import loads

ALL_LINEAR = "all-linear"
Bias = Literal["none", "all", "lora_only"]
_BIASES: tuple[Bias, ...] = get_args(Bias)
_MUTATED = ("pissa", "olora", "corda", "lora_ga")
_MUTATED_FAST = re.compile(r"pissa_niter_\d{1,9}")
_MAX_PATTERN_CHARS = 4096
_MAX_ENTRIES = 100_000


@dataclass(frozen=True)
class LoraSettings:
    """What PEFT would apply: for a module of rank r and alpha, scaling is alpha / r, or
    alpha / sqrt(r) with `use_rslora`. Pattern order is the file's: the first match wins.
    """

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]
    target_modules: str | tuple[str, ...]  # "all-linear", a regular expression, or suffixes
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...]  # empty: all layers
    layers_pattern: tuple[str, ...]
    target_parameters: tuple[str, ...]
    use_dora: bool
    bias: Bias
    lora_bias: bool
    tokens: tuple[tuple[str, tuple[int, ...]], ...]  # module name ("": the embedding) -> token ids
    weight_tying: bool  # the embedding's adapter also answers for a tied head
    invocation_tokens: tuple[int, ...]
    mutated_init: str | None  # the initialisation that changed the base, "pissa"
    base_name: str | None  # what the adapter says it was trained on, for people

    def scaling(self, rank: int, alpha: float) -> float:
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object as it stands. Raises ArtifactInvalid, DocumentInvalid."""
    return loads(dict[str, Any], read_document(path), str(path))


def parse_settings(config: Mapping[str, Any], where: str, rules: Rules = CARRIED) -> LoraSettings:
    """Raises Unsupported for a field that asks for what by the `rules` is not done, AdapterInvalid
    for a value PEFT itself could not use."""
    if "peft_type" not in config:
        raise AdapterInvalid(f"{where}: no peft_type: is this a PEFT adapter?")
    rules.check(config, where)
    read = _Fields(config, where)
    settings = LoraSettings(
        r=read.rank("r", config.get("r", 8)),
        lora_alpha=read.number("lora_alpha", config.get("lora_alpha", 8)),
        use_rslora=read.flag("use_rslora"),
        rank_pattern=tuple(
            (k, read.rank("rank_pattern", v)) for k, v in read.table("rank_pattern")
        ),
        alpha_pattern=tuple(
            (k, read.number("alpha_pattern", v)) for k, v in read.table("alpha_pattern")
        ),
        target_modules=read.modules("target_modules"),
        exclude_modules=read.modules("exclude_modules"),
        layers_to_transform=read.layers("layers_to_transform"),
        layers_pattern=read.patterns("layers_pattern"),
        target_parameters=read.list_of_modules("target_parameters"),
        use_dora=read.flag("use_dora"),
        bias=read.bias(),
        lora_bias=read.flag("lora_bias"),
        tokens=read.tokens("trainable_token_indices"),
        weight_tying=read.flag("ensure_weight_tying"),
        invocation_tokens=read.token_ids("alora_invocation_tokens"),
        mutated_init=read.init(),
        base_name=config.get("base_model_name_or_path"),
    )
    _check_together(settings, config, where)
    return settings


def _check_together(settings: LoraSettings, config: Mapping[str, Any], where: str) -> None:
    chosen = settings.target_modules, settings.target_parameters
    if not any(chosen):
        raise AdapterInvalid(
            f"{where}: target_modules is empty and target_parameters too: "
            "the adapter selects no module"
        )
    if settings.use_dora and settings.lora_bias:
        raise AdapterInvalid(f"{where}: PEFT does not train lora_bias beside use_dora")
    if settings.target_parameters and (settings.use_dora or settings.lora_bias):
        raise AdapterInvalid(
            f"{where}: PEFT trains neither use_dora nor lora_bias beside target_parameters"
        )
    if settings.invocation_tokens and (settings.use_dora or settings.target_parameters):
        raise AdapterInvalid(
            f"{where}: PEFT trains neither use_dora nor target_parameters beside "
            "alora_invocation_tokens"
        )
    if settings.invocation_tokens and (settings.bias != "none" or settings.tokens):
        raise Unsupported(
            f"{where}: alora_invocation_tokens beside bias or trainable_token_indices: in PEFT "
            "those act before the invocation too, and here an adapter waits as a whole"
        )
    by_layer = config.get("layers_to_transform") is not None
    if isinstance(settings.target_modules, str) and (by_layer or settings.layers_pattern):
        raise AdapterInvalid(f"{where}: layers_to_transform needs target_modules to be a list")
    if settings.layers_pattern and not by_layer:
        raise AdapterInvalid(f"{where}: layers_pattern needs layers_to_transform beside it")


@dataclass(frozen=True)
class _Fields:
    """Typed access to the fields; every error names the file and the field."""

    config: Mapping[str, Any]
    where: str

    def _wrong(self, name: str, need: str, have: object) -> NoReturn:
        raise AdapterInvalid(f"{self.where}: {name} must be {need}, not {str(have)[:80]!r}")

    def rank(self, name: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_RANK:
            self._wrong(name, f"a whole number from 1 to {MAX_RANK}", value)
        return value

    def number(self, name: str, value: object) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            self._wrong(name, "a number", value)
        if not abs(value) < 1e9:
            self._wrong(name, "a finite number below 1e9", value)
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.config.get(name)
        if value is not None and not isinstance(value, bool):
            self._wrong(name, "true or false", value)
        return bool(value)

    def table(self, name: str) -> list[tuple[str, object]]:
        value = self.config.get(name)
        if value is None:
            return []
        if not isinstance(value, dict) or len(value) > _MAX_ENTRIES:
            self._wrong(name, "a table of patterns", value)
        return [(self._text(name, key), entry) for key, entry in value.items()]

    def modules(self, name: str) -> str | tuple[str, ...]:
        value = self.config.get(name)
        return self._text(name, value) if isinstance(value, str) else self._texts(name, value)

    def list_of_modules(self, name: str) -> tuple[str, ...]:
        return self._texts(name, self.config.get(name))

    def init(self) -> str | None:
        """The name of an initialisation that took the adapter's first values out of the base
        weights; None for one that left them."""
        value = self.config.get("init_lora_weights")
        text = value.lower() if isinstance(value, str) else value
        if text is None or isinstance(text, bool) or text in PLAIN_INITS:
            return None
        if text in _MUTATED or (isinstance(text, str) and _MUTATED_FAST.fullmatch(text)):
            return text
        why = "it quantizes the base weights" if text == "loftq" else "it is not known"
        raise Unsupported(
            f"{self.where}: init_lora_weights = {str(value)[:80]!r}: {why}, so what the adapter "
            f"does to the unchanged base cannot be told; {MERGE}"
        )

    def bias(self) -> Bias:
        value = self.config.get("bias") or "none"
        known = next((b for b in _BIASES if b == value), None)
        if known is None:
            self._wrong("bias", "none, all or lora_only", value)
        return known

    def tokens(self, name: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """A list is about the embedding, a table says for each module."""
        value = self.config.get(name)
        if not isinstance(value, dict):
            ids = self.token_ids(name)
            return (("", ids),) if ids else ()
        found = ((self._text(name, k), self._ids(name, v)) for k, v in value.items())
        return tuple((module, ids) for module, ids in found if ids)

    def token_ids(self, name: str) -> tuple[int, ...]:
        return self._ids(name, self.config.get(name))

    def _ids(self, name: str, value: object) -> tuple[int, ...]:
        if value is None:
            return ()
        if not isinstance(value, list) or len(value) > _MAX_ENTRIES:
            self._wrong(name, "a list of token ids", value)
        for entry in value:
            if not isinstance(entry, int) or isinstance(entry, bool) or entry < 0:
                self._wrong(name, "token ids", value)
        if name == "alora_invocation_tokens" and len(value) > MAX_INVOCATION_TOKENS:
            self._wrong(name, f"at most {MAX_INVOCATION_TOKENS} token ids", f"{len(value)} of them")
        return tuple(value)

    def patterns(self, name: str) -> tuple[str, ...]:
        value = self.config.get(name)
        return self._texts(name, [value] if isinstance(value, str) and value else value or None)

    def layers(self, name: str) -> tuple[int, ...]:
        value = self.config.get(name)
        values = [] if value is None else value if isinstance(value, list) else [value]
        for entry in values[: _MAX_ENTRIES + 1]:
            if not isinstance(entry, int) or isinstance(entry, bool) or entry < 0:
                self._wrong(name, "layer numbers", value)
        return tuple(values)

    def _texts(self, name: str, value: object) -> tuple[str, ...]:
        if value is None:
            return ()
        if not isinstance(value, list) or len(value) > _MAX_ENTRIES:
            self._wrong(name, "a list of module names or a regular expression", value)
        return tuple(self._text(name, entry) for entry in value)

    def _text(self, name: str, value: object) -> str:
        if not isinstance(value, str) or not value or len(value) > _MAX_PATTERN_CHARS:
            self._wrong(name, f"text of 1 to {_MAX_PATTERN_CHARS} characters", value)
        return value
