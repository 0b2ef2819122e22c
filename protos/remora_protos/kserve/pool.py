"""The descriptor pool of the KServe messages, apart from protobuf's default one.

Their package, `inference`, is that of the public definitions, so every KServe client registers the
same names. In one pool the second to come would be refused as a duplicate; here both orders of
import work. `scripts/generate_protos.py` makes the generated code use it.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pool

_POOL = descriptor_pool.DescriptorPool()
_DEFAULT = descriptor_pool.Default()


def Default() -> descriptor_pool.DescriptorPool:
    """Under the name that generated code calls."""
    return _POOL


class BothPools:
    """What server reflection looks up: the KServe messages here, everything else where it is."""

    def FindFileByName(self, name: str) -> Any:
        return _first("FindFileByName", name)

    def FindFileContainingSymbol(self, symbol: str) -> Any:
        return _first("FindFileContainingSymbol", symbol)

    def FindMessageTypeByName(self, name: str) -> Any:
        return _first("FindMessageTypeByName", name)

    def FindExtensionByNumber(self, message: Any, number: int) -> Any:
        return _DEFAULT.FindExtensionByNumber(message, number)

    def FindAllExtensions(self, message: Any) -> Any:
        return _DEFAULT.FindAllExtensions(message)


def _first(method: str, name: str) -> Any:
    """Raises KeyError when neither pool has it."""
    try:
        return getattr(_POOL, method)(name)
    except KeyError:
        return getattr(_DEFAULT, method)(name)
