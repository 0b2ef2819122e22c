"""Which labels a device may have. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from remora_contract.errors import RequestInvalid
from remora_contract.windows import parse_windows, windows_of
from remora_controller.selector import RESERVED, check_label

MAX_LABELS = 64


def check_labels(labels: Mapping[str, str]) -> None:
    """Raises RequestInvalid."""
    if len(labels) > MAX_LABELS:
        raise RequestInvalid(f"a device has at most {MAX_LABELS} labels")
    for key, value in labels.items():
        check_label(key, value)
        if key in RESERVED:
            raise RequestInvalid(f"label key {key!r} has a meaning of its own in selectors")
    try:
        parse_windows(windows_of(labels))
    except ValueError as e:
        raise RequestInvalid(str(e)) from e
