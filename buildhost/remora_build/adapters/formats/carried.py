"""What passes from any format to any other: factors on the projections of dense decoder layers.

Owns the rule that whatever more an adapter holds is refused by its name. Knows no files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora_build.adapters.sidecar import Factor
from remora_contract.adapter import Adapter
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import AdapterInvalid, Unsupported
from remora_contract.targets import PROJECTIONS, AdapterTarget

_FACTOR = frozenset({"a", "b", "scaling"})
_HAVE_NO_PLACE = "cannot be carried into this format"
_CALLED = {"scale": "its DoRA magnitude", "bias": "its bias"}
_TARGET = frozenset({"layer", "projection", "rank", "scaling", "dora", "bias"})
_DOCUMENT = frozenset(
    {
        "format_version",
        "base_digest",
        "dtype",
        "targets",
        "files",
        "source_config",
        "exporter",
        "notes",
        "invocation_tokens",
    }
)


@dataclass(frozen=True)
class Carried:
    """Factors in float32 with the scaling in b; what a format has no place for it must refuse
    (`check_only`). `source_config` is PEFT's adapter_config.json as it stood, empty when it is not
    known."""

    factors: Mapping[AdapterTarget, Factor]
    source_config: Mapping[str, Any] = field(default_factory=dict)
    invocation_tokens: tuple[int, ...] = ()  # of activated LoRA

    def __post_init__(self) -> None:
        if not self.factors:
            raise AdapterInvalid("the adapter changes no projection: there is nothing to convert")
        for target in self.factors:
            check_projection(target)

    @property
    def ranks(self) -> dict[AdapterTarget, int]:
        return {target: factor.rank for target, factor in self.factors.items()}

    def check_only(self, also: frozenset[str]) -> None:
        """Raises Unsupported naming what the adapter holds beside plain factors and `also`, which
        are fields of `Factor` or of this class."""
        if self.invocation_tokens and "invocation_tokens" not in also:
            raise Unsupported("its invocation tokens (alora_invocation_tokens) " + _HAVE_NO_PLACE)
        for target, factor in sorted(self.factors.items()):
            _refuse_beyond(factor, _FACTOR | also, target.name())


def check_projection(target: AdapterTarget) -> None:
    """Raises Unsupported for experts, the embedding and the head."""
    if target.projection not in PROJECTIONS:
        raise Unsupported(
            f"{target.name()}: experts, embedding and head cannot be carried to or from another "
            "format yet; only the seven projections of a dense layer can"
        )


def check_target(target: AdapterTarget, decoder: DecoderSpec) -> None:
    """Raises Unsupported as `check_projection`, AdapterInvalid when the base has no such layer or
    projection."""
    check_projection(target)
    if target.layer >= decoder.layers:
        raise AdapterInvalid(f"{target.name()}: the base has {decoder.layers} layers")
    if target.projection not in decoder.projections(target.layer):
        raise AdapterInvalid(f"{target.name()}: the base's layer {target.layer} does not have it")


def refuse_more(adapter: Adapter) -> None:
    """Raises Unsupported naming the first thing a sidecar's document tells of that `Carried` has no
    place for, whichever version of the document added it."""
    _refuse_beyond(adapter, _DOCUMENT, "adapter.json")
    for target in adapter.targets:
        _refuse_beyond(target, _TARGET, target.target.name())


def check_finite(values: NDArray[np.float32], where: str) -> None:
    """Raises AdapterInvalid: one NaN would spoil every row of a batch."""
    if not np.isfinite(values).all():
        raise AdapterInvalid(f"{where} holds NaN or infinity; the adapter is damaged")


def _refuse_beyond(value: Any, known: frozenset[str], where: str) -> None:
    for entry in dataclasses.fields(value):
        if entry.name not in known and not _says_nothing(getattr(value, entry.name)):
            raise Unsupported(f"{where}: {_CALLED.get(entry.name, entry.name)} {_HAVE_NO_PLACE}")


def _says_nothing(value: Any) -> bool:
    return value is None or value is False or (hasattr(value, "__len__") and len(value) == 0)
