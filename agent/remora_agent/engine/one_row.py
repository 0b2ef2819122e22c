"""How a child process opens an engine to try it: as this process would, with one row, because what
serves now keeps its memory. As JSON on the way."""

from __future__ import annotations

from dataclasses import dataclass

from remora_agent.engine.backends import check_backend
from remora_agent.engine.opening import EngineOptions
from remora_agent.engine.prefill import check_choice


@dataclass(frozen=True)
class OneRow:
    accuracy_level: int
    prefill: str
    backend: str
    context: int | None = None
    threads: int | None = None

    @classmethod
    def of(cls, options: EngineOptions) -> OneRow:
        return cls(
            accuracy_level=options.accuracy_level,
            prefill=options.prefill,
            backend=options.backend,
            context=options.context,
            threads=options.threads,
        )

    def options(self) -> EngineOptions:
        """Raises RequestInvalid."""
        return EngineOptions(
            rows=1,
            context=self.context,
            threads=self.threads,
            accuracy_level=self.accuracy_level,
            prefill=check_choice(self.prefill),
            backend=check_backend(self.backend),
        )
