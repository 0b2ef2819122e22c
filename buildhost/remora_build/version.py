"""How documents name the program that wrote them."""

from __future__ import annotations

from remora_contract import __version__


def exporter_name() -> str:
    """`remora 0.1.0`: goes into every bundle and adapter document."""
    return f"remora {__version__}"
