"""What turns an assignment into a model that answers; one implementation for each kind of model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from remora_agent.host import Assignment
from remora_agent.hosting.engines import EngineSource
from remora_agent.runtime.model import Model
from remora_agent.runtime.model_runtime import ModelRuntime
from remora_agent.runtime.options import RuntimeOptions
from remora_contract.bundle import load_bundle


class ModelOpener(Protocol):
    def check(self, assignment: Assignment) -> None:
        """Before anything is built of it. Raises Unsupported for what no model of this kind could
        honour."""
        ...

    def open(
        self, assignment: Assignment, options: RuntimeOptions, free_bytes: Callable[[], int]
    ) -> Model:
        """Neither probed nor named yet. Blocking. Raises what loading raises."""
        ...


class EngineModels:
    """Engines of ours, step by step."""

    def __init__(self, engines: EngineSource) -> None:
        self._engines = engines

    def check(self, assignment: Assignment) -> None:
        """Whatever cannot be honoured is found when it is proven and adopted."""

    def open(
        self, assignment: Assignment, options: RuntimeOptions, free_bytes: Callable[[], int]
    ) -> Model:
        directory = assignment.bundle_directory
        engine = self._engines.load(directory)
        try:
            return ModelRuntime.open(
                engine,
                load_bundle(directory),
                directory,
                options=options,
                sampling=assignment.sampling,
                free_bytes=free_bytes,
            )
        except BaseException:
            engine.close()
            raise
