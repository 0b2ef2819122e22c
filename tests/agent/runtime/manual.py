"""A ModelRuntime without threads: the test says when it steps and when a file has been read.

with manual_runtime(engine, bundle, directory, clock=lambda: now) as (runtime, loop, reads):
    runtime.submit(...); loop.step(); reads.finish()
"""

from __future__ import annotations

from contextlib import contextmanager
from unittest.mock import patch

from remora_agent.bank.loader import MAX_IN_FLIGHT
from remora_agent.runtime import model_runtime
from remora_agent.runtime.model_runtime import ModelRuntime
from remora_contract.errors import ArtifactInvalid, Unavailable
from tests.support.runtime import byte_text


class ManualLoop:
    """Takes the place of StepLoop; what others ask for is done at once."""

    failed = False

    def __init__(self, step, on_exit, clock):
        self.step = step
        self._on_exit = on_exit
        self._ended = False

    def start(self):
        pass

    def wake(self):
        pass

    def heartbeat_age_s(self):
        return 0.0

    def post(self, run):
        if not self._ended:
            run()

    def call(self, run, timeout_s):
        return run()

    def stop(self):
        if not self._ended:
            self._ended = True
            self._on_exit(Unavailable("the runtime is shutting down"))


class ManualReads:
    """Takes the place of Loader; reads the real files when the test says so."""

    def __init__(self, load, on_loaded, clock):
        self._load = load
        self._on_loaded = on_loaded
        self.in_flight = []

    def start(self, adapter):
        if len(self.in_flight) >= MAX_IN_FLIGHT or adapter in self.in_flight:
            return False
        self.in_flight.append(adapter)
        return True

    def finished(self, digest):
        self.in_flight = [a for a in self.in_flight if a.digest != digest]

    def freed(self):
        pass

    def finish(self, *, broken=False):
        """The first that was started."""
        adapter = self.in_flight[0]
        result = ArtifactInvalid("damaged") if broken else self._load(adapter.directory)
        self._on_loaded(adapter.digest, result, 0.0)

    def close(self):
        self.in_flight = []


@contextmanager
def manual_runtime(engine, bundle, directory, **more):
    with (
        patch.object(model_runtime, "StepLoop", ManualLoop),
        patch.object(model_runtime, "Loader", ManualReads),
    ):
        runtime = ModelRuntime(engine, bundle, byte_text(), directory, **more)
    try:
        yield runtime, runtime._loop, runtime._loader
    finally:
        runtime.close()
