"""A quantization tool's config, read strictly: every key is taken, known to change nothing here, or
refused by its name with the next step. Owns the rules; knows no tool.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from remora_build.quantized.layout import Layout
from remora_contract.errors import CheckpointInvalid, Unsupported

INT4_BLOCKS = (32, 64, 128)  # what TensorRT and ONNX Runtime both take
_NEXT = "export the original checkpoint (--quant, --int4-block), or quantize it again"


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint's linear modules are stored.

    `folded`: whether a smoothing scale lies in norms and projections, of which the checkpoint
    itself tells nothing; None: the tool does not say. `notes` are for bundle.json. `cache_scales`:
    suffixes of tensors for a quantized cache, which is not carried.
    """

    layout: Layout
    folded: bool | None
    notes: Mapping[str, str] = field(default_factory=dict)
    cache_scales: tuple[str, ...] = ()


class Section:
    """One table of a config. Every method raises Unsupported or CheckpointInvalid naming it."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.where = where
        self._left = dict(data)

    def take(self, key: str, default: Any = None) -> Any:
        value = self._left.pop(key, None)
        return default if value is None else value

    def has(self, key: str) -> bool:
        return self._left.get(key) is not None

    def only(self, key: str, *allowed: Any) -> Any:
        """An absent one is the first of `allowed`."""
        value = self.take(key, allowed[0])
        if not any(value == a and type(value) is type(a) for a in allowed):
            self.refuse(f"{key} is {str(value)[:80]!r}", "with " + self._words(key, allowed))
        return value

    def block(self, key: str) -> int:
        """A number of weights that share a scale."""
        value = self.take(key)
        if type(value) is not int or value not in INT4_BLOCKS:
            self.refuse(f"{key} is {str(value)[:80]!r}", "with " + self._words(key, INT4_BLOCKS))
        return value

    def table(self, key: str) -> Section | None:
        value = self.take(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise CheckpointInvalid(f"{self.where}: {key} is no table")
        return Section(value, f"{self.where}.{key}")

    def tables(self) -> list[Section]:
        """All entries, which are tables."""
        return [found for key in list(self._left) if (found := self.table(key)) is not None]

    def same_as(self, other: Section, *but: str) -> bool:
        """Whether both say the same, apart from the keys `but`."""
        mine, theirs = ({k: v for k, v in s._left.items() if k not in but} for s in (self, other))
        return mine == theirs

    def refuse(self, what: str, wanted: str) -> NoReturn:
        raise Unsupported(f"{self.where}: {what}, which is not read; {_NEXT} {wanted}")

    def finish(self, *irrelevant: str) -> None:
        """What nobody took might change the weights."""
        for key, value in self._left.items():
            if key not in irrelevant and value not in (None, False, [], {}, ""):
                raise Unsupported(
                    f"{self.where}: {key[:80]!r} is not known to this version, so its effect "
                    f"cannot be honoured (it says {str(value)[:80]!r})"
                )

    @staticmethod
    def _words(key: str, allowed: tuple[Any, ...]) -> str:
        return f"{key} " + " or ".join(map(str, allowed))


def not_rounded(what: str) -> dict[str, str]:
    """The note of a checkpoint whose tool also rounds the modules' inputs as it goes."""
    return {"activations": f"stay in the graph's dtype: {what}'s rounding of them is left out"}


def cache_note(scheme: Any) -> dict[str, str]:
    return {
        "cache": f"stays in the graph's dtype: its quantization ({str(scheme)[:80]}) is left out"
    }
