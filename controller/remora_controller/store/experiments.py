"""The part of the store that keeps what arms of experiments counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from remora_controller.experiments.tally import ArmRow


class ExperimentStore(Protocol):
    def save_arm_counts(
        self, rows: Sequence[ArmRow], dropped: Sequence[tuple[str, str]] = ()
    ) -> None:
        """Each in place of what was known of its device and label; `dropped` goes. Of devices that
        are there: a removed one's counts go with it."""
        ...

    def arm_counts(self) -> list[ArmRow]:
        """All, by device and label."""
        ...
