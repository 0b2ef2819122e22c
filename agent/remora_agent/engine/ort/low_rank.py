"""The operator LowRankAdd of this package's own library: is it there, and which place in its table
has each projection. Runs nothing.

The library (native/low_rank_add.c) is optional. Where it was not built, or does not load, engines
are built in the grouped form (docs/engines.md).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import onnxruntime as ort

from remora_contract.decoder import DecoderSpec
from remora_contract.errors import EngineFault
from remora_contract.targets import EXPERT_GROUPS, PARTS, AdapterTarget

DOMAIN = "com.remora"
OPERATOR = "LowRankAdd"
VERSION = 1  # of what the operator's inputs mean, as the library tells its own
LIBRARY = Path(__file__).parent / "native" / "low_rank_add.so"
FIELDS = 5  # of an entry: address of A, address of B, rank, bytes of a number, bits of the weight
_REBUILD = "build it with a C compiler: python -m remora_agent.engine.ort.native.build"


@dataclass(frozen=True)
class Operator:
    """What can be used: `products` are the processor's instructions; or `missing` says why not."""

    products: str = ""
    missing: str = ""

    @property
    def version(self) -> int | None:
        """As a recipe has it."""
        return None if self.missing else VERSION


def operator() -> Operator:
    """Of the installed library, looked at once."""
    return look_at(LIBRARY)


@cache
def look_at(library: Path) -> Operator:
    """Loads it, here and into the runtime."""
    if not library.is_file():
        return Operator(missing=f"{library.name} was not built; {_REBUILD}")
    try:
        loaded = ctypes.CDLL(str(library))
        found = int(loaded.remora_low_rank_add_version())
        products = loaded.remora_low_rank_add_products
    except (OSError, AttributeError) as e:
        return Operator(missing=f"{library} does not load: {e}; {_REBUILD}")
    if found != VERSION:
        why = f"{library} is of version {found}, not {VERSION}"
        return Operator(missing=f"{why}; {_REBUILD}")
    try:
        _give(ort.SessionOptions(), library)
    except EngineFault as e:
        return Operator(missing=str(e))
    products.restype = ctypes.c_char_p
    return Operator(products=products().decode())


def register(options: ort.SessionOptions) -> None:
    """For a session of a model that has the operator. Raises EngineFault where it is missing."""
    if missing := operator().missing:
        raise EngineFault(f"the engine was built with the operator {OPERATOR}, but {missing}")
    _give(options, LIBRARY)


def _give(options: ort.SessionOptions, library: Path) -> None:
    try:
        options.register_custom_ops_library(str(library))
    except Exception as e:  # the runtime's exceptions share no base class
        raise EngineFault(f"onnxruntime {ort.__version__} refuses {library}: {e}") from e


def places(decoder: DecoderSpec) -> dict[AdapterTarget, int]:
    """The place of each target in the operator's table; a group's parts follow each other."""
    groups = [
        (layer, group)
        for layer in range(decoder.layers)
        for group in decoder.groups(layer)
        if group not in EXPERT_GROUPS
    ]
    targets = [AdapterTarget(layer, part) for layer, group in groups for part in PARTS[group]]
    return {target: i for i, target in enumerate((*targets, AdapterTarget(0, "head")))}
