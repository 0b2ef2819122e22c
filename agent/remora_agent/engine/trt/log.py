"""What the builder says while it works: kept, bounded, and judged. Pure but for writing the log.

A warning is *harmless* (known, expected of every build), *fatal* (something of the graph was
dropped, so the engine computes something else) or *unknown*: said aloud, and no reason to refuse,
because each version has its own.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from typing import Any

from remora_agent.engine.trt.files import FACT_ACTIVATION, FACT_WEIGHTS
from remora_agent.engine.trt.native import native

# Said of every build of the portable graph.
HARMLESS = (
    # About every int64 input, which is what the contract asks for.
    "has Int64 binding",
    # About the experts' Loop, whose condition is always true. Without one the builder crashes.
    "both a trip limit and a loop termination condition",
    # About this process and this machine, not about the graph.
    "CUDA lazy loading is not enabled",
    "Unable to determine GPU memory usage",
    "Device memory is insufficient to use tactic",
    "insufficient memory on requested size",
)
_FATAL = re.compile(r"unused|not used|no effect|ignor|dropp|unsupported|not supported", re.I)
_SIZES = {
    FACT_WEIGHTS: re.compile(r"Total Weights Memory: (\d+) bytes"),
    FACT_ACTIVATION: re.compile(r"Total Activation Memory: (\d+) bytes"),
}
_MAX_KEPT = 64  # lines of each kind
_MAX_LINE = 400


@dataclass
class BuildLog:
    """Lines by severity, and the sizes that the builder mentions."""

    errors: list[str] = field(default_factory=list)
    # Warnings, judged as they come: a thousand harmless ones hide no other.
    dropped: list[str] = field(default_factory=list)  # the engine is not the graph
    unknown: list[str] = field(default_factory=list)  # nobody has judged them yet
    sizes: dict[str, int] = field(default_factory=dict)  # name as in `_SIZES`, bytes

    def attach(self, trt: Any) -> Any:
        """An ILogger of the module `trt` that writes here, and everything to the child's log."""
        levels = trt.ILogger.Severity

        def log(severity: Any, message: str) -> None:
            if severity == levels.VERBOSE:
                return
            self.take(
                message,
                error=severity in (levels.ERROR, levels.INTERNAL_ERROR),
                warning=severity == levels.WARNING,
            )

        return native(trt.ILogger, log=log)

    def take(self, message: str, error: bool = False, warning: bool = False) -> None:
        line = message[:_MAX_LINE]
        mark = "E" if error else "W" if warning else "I"
        # Names come from the graph, and the child's log may be in any encoding.
        sys.stdout.write(f"[{mark}] {ascii(line)[1:-1]}\n")
        sys.stdout.flush()  # the last lines are what is left of a build that crashed
        if error:
            _keep(self.errors, line)
        elif warning and not any(known in line for known in HARMLESS):
            _keep(self.dropped if _FATAL.search(line) else self.unknown, line)
        for name, pattern in _SIZES.items():
            if found := pattern.search(line):
                self.sizes[name] = max(self.sizes.get(name, 0), int(found[1]))


def _keep(lines: list[str], line: str) -> None:
    if len(lines) < _MAX_KEPT:
        lines.append(line)
