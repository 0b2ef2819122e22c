"""A GPU that is too small for a release: the plan, the device that admits it and the device that
would build it say the same, of a TensorRT that is emulated."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from remora_agent.control.facts import gpu_facts, machine_facts, setting_facts
from remora_agent.engine.opening import EngineOptions, recipe_of
from remora_agent.engine.trt import recipe as recipes
from remora_agent.engine.trt.module import TrtModule, api_of
from remora_agent.engine.trt.target import Gpu
from remora_agent.hosting.engines import CachedEngines, EngineSettings
from remora_build.publish.source import bundle_facts
from remora_contract.artifact import Manifest
from remora_contract.bundle import Bundle, BundleFile
from remora_contract.device_phase import Phase
from remora_contract.errors import Exhausted, Refused
from remora_contract.memory_need import Sizing
from remora_contract.trt_memory import LEAST_WORKSPACE_BYTES, GpuMemory, TrtSizes, least_plan
from remora_controller.domain import Device as Known
from remora_controller.planner import Contents, DevicePlan, make_plan
from remora_controller.services.wire import facts_of
from tests.agent.control.device import Device
from tests.support.repository import Repository, make_bundle, make_release

ROWS = 4
VERSIONS = {"tensorrt": "10.3.0", "tensorrt_rtx": "1.7.1"}


@dataclasses.dataclass
class Bench:
    """A device with a GPU of `memory`, and the controller that hears of it."""

    device: Device
    bundle: Bundle
    manifest: Manifest
    options: EngineOptions
    engines: CachedEngines

    def plan(self) -> DevicePlan:
        facts = machine_facts(self.device.layout.root)
        facts.engine_key.update(self.engines.key())
        facts.backends[self.options.backend] = VERSIONS[self.options.backend]
        facts.MergeFrom(gpu_facts(self.engines.gpu_memory()))
        facts.MergeFrom(setting_facts(self.sizing, 0))
        known = Known("d", 0.0, "key", facts_of(facts))
        release = make_release("new", self.manifest)
        contents = Contents(release, {self.manifest.digest: self.manifest})
        (plan,) = make_plan([known], frozenset(), contents, {}, ()).devices
        return plan

    @property
    def sizing(self) -> Sizing:
        return Sizing(self.options.backend, ROWS, None, 1 << 20, "plain")

    def admit(self, until: Phase | None = None) -> Any:
        device = self.device
        effects = dataclasses.replace(device.effects, sizing=self.sizing)
        device.host.gpu = self.engines.gpu_memory()
        device.reconciler._effects = effects
        device.assign(make_release("new", self.manifest))
        return device.settle(until)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[Device] = []

    def bench_of(backend: str, missing: int, is_shared: bool = True) -> Bench:
        """The GPU is `missing` bytes too small for the least plan."""
        repository = Repository(tmp_path / "repository")
        listed = repository.bundle(1, 120_000)
        files = tuple(BundleFile(f.path, f.size, f.digest) for f in listed.files[1:])
        bundle = make_bundle(files)
        facts = bundle_facts(bundle)
        repository.tamper(listed, facts=facts)
        any_size = GpuMemory(1 << 40, is_shared)
        least = least_plan(TrtSizes.of(bundle), ROWS, bundle.graph.context, any_size).total
        gpu = Gpu("Orin", 87, GpuMemory(least - missing, is_shared), "540", "0")
        monkeypatch.setattr(recipes, "this_gpu", lambda name: gpu)
        monkeypatch.setattr(recipes, "load_module", _module)
        options: Any = EngineOptions(rows=ROWS, backend=backend)
        settings = EngineSettings(tmp_path / "engines", options=options)
        device = Device(tmp_path / "state", repository.root)
        made.append(device)
        manifest = dataclasses.replace(listed, facts=facts)
        return Bench(device, bundle, manifest, options, CachedEngines(settings))

    yield bench_of
    for device in made:
        device.database.close()


def _module(backend: Any) -> TrtModule:
    version = VERSIONS[backend]
    return TrtModule(backend, ModuleType(backend), version, api_of(backend, version))


@pytest.mark.parametrize("is_shared", [True, False])
def test_the_plan_refuses_what_the_device_would_not_admit_and_could_not_build(bench, is_shared):
    small = bench("tensorrt", missing=1, is_shared=is_shared)
    (refusal,) = small.plan().refusals
    assert refusal.code == "memory"
    assert ("pinned" in refusal.need) == is_shared
    assert small.admit().phase is Phase.REFUSED
    assert small.device.record.error_code == "memory"
    assert str(refusal) in small.device.record.error_message
    assert small.device.source.sent == 0, "refused before a byte is shipped"
    with pytest.raises(Exhausted) as built:
        recipe_of(small.bundle, small.options)
    assert str(built.value) == str(refusal)


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_byte_more_is_planned_admitted_and_built_with_the_workspace_that_was_planned(
    bench, is_shared
):
    enough = bench("tensorrt", missing=0, is_shared=is_shared)
    plan = enough.plan()
    assert plan.refusals == ()
    assert enough.admit(Phase.BUILDING).phase is Phase.BUILDING
    gpu = recipe_of(enough.bundle, enough.options).gpu
    assert gpu is not None and gpu.workspace_bytes == LEAST_WORKSPACE_BYTES
    least = enough.engines.gpu_memory().bytes
    assert plan.peak_memory_bytes == least - 2 * LEAST_WORKSPACE_BYTES + gpu.workspace_bytes


def test_an_engine_of_tensorrt_rtx_is_refused_by_the_same_sum(bench):
    """Its build knows no GPU, so nothing else would refuse it before it is loaded."""
    small = bench("tensorrt_rtx", missing=1)
    (refusal,) = small.plan().refusals
    assert small.admit().phase is Phase.REFUSED
    assert str(refusal) in small.device.record.error_message
    assert small.plan().peak_memory_bytes == small.engines.gpu_memory().bytes + 1


def test_a_gpu_that_does_not_answer_is_not_known_and_not_refused(bench, monkeypatch):
    silent = bench("tensorrt", missing=1)

    def gone(backend: str) -> Gpu:
        raise Refused("no NVIDIA GPU (none is visible)")

    monkeypatch.setattr(recipes, "this_gpu", gone)
    plan = silent.plan()
    assert (plan.refusals, plan.peak_memory_bytes) == ((), None)
    assert silent.admit(Phase.BUILDING).phase is Phase.BUILDING
