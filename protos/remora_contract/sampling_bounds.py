"""Which values settings of sampling may have, whatever the model: of requests and of releases.
Pure, and light to import.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from remora_contract.errors import RequestInvalid


@dataclass(frozen=True)
class Range:
    least: float
    most: float
    meaning: str = ""
    open: bool = False  # without `least` itself

    def holds(self, value: float) -> bool:
        """NaN is in no range, infinity neither."""
        inside = self.least < value if self.open else self.least <= value
        return inside and value <= self.most and value != math.inf

    def described(self) -> str:
        """ "above 0 and at most 1 (1 keeps all)" """
        least = "above " if self.open else ""
        upper = f" and at most {self.most:g}" if math.isfinite(self.most) else ""
        lower = f"{least}{self.least:g}" if self.open else f"{self.least:g} or more"
        meaning = f" ({self.meaning})" if self.meaning else ""
        return f"{lower}{upper}{meaning}"

    def check(self, name: str, value: float) -> None:
        """Raises RequestInvalid."""
        if not self.holds(value):
            raise RequestInvalid(f"{name} must be {self.described()}, not {value}")


RANGES = {
    "temperature": Range(0, math.inf, "0 is greedy"),
    "top_k": Range(0, math.inf, "0 keeps all"),
    "top_p": Range(0, 1, "1 keeps all", open=True),
    "min_p": Range(0, 1, "0 keeps all"),
    "repetition_penalty": Range(0.01, 100, "1 changes nothing"),
    "presence_penalty": Range(-2, 2, "0 changes nothing"),
    "frequency_penalty": Range(-2, 2, "0 changes nothing"),
}
LENGTHS = {"max_tokens": Range(1, math.inf), "min_tokens": Range(0, math.inf)}
