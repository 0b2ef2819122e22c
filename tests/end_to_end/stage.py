"""What the end-to-end tests stand on: a checkpoint taken through the build host, and a fleet.

Owns the artifacts' names. Built from the demo's pieces: the same commands a user types.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from examples.demo.account import Account
from examples.demo.asking import Survey, survey
from examples.demo.build import REPOSITORY, Artifact, Built, convert, publish
from examples.demo.cast import Cast, Check, ReferenceOracle, reference_cast
from examples.demo.fleet import Agent, Fleet
from examples.demo.processes import DemoFailed, Workshop, await_value
from remora_agent.client import Result
from remora_contract.bundle import load_bundle

ROOT = Path(__file__).resolve().parents[2]
MODEL = "tiny"
# Behind whatever the tests themselves were told to import from.
_PATHS = (str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(_PATHS), "COLUMNS": "120"}
FINAL = ("COMPLETED", "ROLLED_BACK", "ABORTED", "PAUSED")


@dataclass(frozen=True)
class ExactOracle:
    """A float32 bundle must give the reference's tokens, every one."""

    reference: ReferenceOracle

    def check(self, variant: str, question: str, result: Result) -> Check:
        right = self.reference.answers[variant][question]
        assert min(right.margin) > 1e-3, "the reference is undecided here: choose another seed"
        if result.token_ids == right.ids:
            return Check(None, len(right.ids))
        return Check(f"{variant}: {question!r}: {result.token_ids}, not {right.ids}", 0)


@dataclass(frozen=True)
class Artifacts:
    """On disk, and published in `folder / REPOSITORY`: the bundle and all adapters."""

    folder: Path
    cast: Cast
    built: Built

    @property
    def bundle(self) -> Artifact:
        return self.built.bundles["fp32"]


def make_artifacts(folder: Path) -> Artifacts:
    """A random Qwen3 checkpoint and adapters, exported, converted, published and recorded."""
    from tests.support.checkpoints import make_checkpoint

    checkpoint = make_checkpoint(
        folder / "checkpoint", "qwen3", hidden=128, heads=2, head_dim=64, kv_heads=1, seed=11
    )
    shop = Workshop(folder, dict(ENVIRONMENT))
    shop.run("python", "-m", "examples.demo.reference", str(checkpoint), "reference")
    cast = reference_cast(checkpoint, folder / "reference", MODEL)
    assert isinstance(cast.oracle, ReferenceOracle)
    cast = dataclasses.replace(cast, precision="fp32", oracle=ExactOracle(cast.oracle))
    out = f"bundles/{MODEL}-fp32"
    shop.run("remora-build", "export", "checkpoint", out, "--dtype", "float32")
    found = load_bundle(folder / out)
    bundle = Artifact(out, MODEL, "fp32", found.digest, found.bytes)
    adapters = convert(shop, Account(Console(quiet=True)), cast)
    for artifact in (bundle, *adapters.values()):
        publish(shop, artifact)
    return Artifacts(folder, cast, Built({"fp32": bundle}, adapters))


@dataclass(frozen=True)
class Stage:
    """A running controller with a repository of its own, and the agents a test lets join."""

    shop: Workshop
    fleet: Fleet
    artifacts: Artifacts

    @property
    def repository(self) -> Path:
        return self.shop.folder / REPOSITORY

    def join(self, *names: str, download_bytes_per_s: int | None = None) -> list[Agent]:
        agents = [
            self.fleet.join(name, f"name={name}", download_bytes_per_s=download_bytes_per_s)
            for name in names
        ]
        for agent in agents:
            self.fleet.await_listening(agent)
        return agents

    def release(self, name: str, bundle: str, *variants: str, use_case: str = "") -> None:
        """Creates a release of a bundle reference and adapters by variant."""
        chosen = [self.artifacts.built.adapters[v] for v in variants]
        options = [part for a in chosen for part in ("--adapter", f"{a.name}={a.reference}")]
        options += ["--use-case", use_case] if use_case else []
        self.shop.run("remora", "releases", "create", "--name", name, "--bundle", bundle, *options)

    def release_file(self, name: str, adapters: Mapping[str, str], **more: Any) -> None:
        """Creates a release from a file; `more` are further keys of release.yaml, also `bundle`."""
        base = {"name": name, "bundle": self.artifacts.bundle.reference}
        document = {**base, "adapters": dict(adapters), **more}
        path = self.shop.folder / f"{name}.yaml"
        path.write_text(json.dumps(document))  # JSON is YAML
        self.shop.run("remora", "releases", "create", "--file", path.name)

    def start(self, name: str, *options: str) -> str:
        """Starts a rollout and returns its id."""
        return str(
            self.fleet.operator("rollout", "start", name, "--soak", "0.5", *options)["rollout_id"]
        )

    def roll_out(self, name: str, *options: str) -> None:
        assert self.ended(self.start(name, *options))["state"] == "COMPLETED"

    def ended(self, rollout: str, within_s: float = 120.0) -> dict[str, Any]:
        """The rollout once it has ended or paused itself."""

        with contextlib.suppress(DemoFailed):  # of every other end than COMPLETED
            self.shop.run("remora", "rollout", "wait", rollout, "--timeout", str(within_s))
        found = self.fleet.operator("rollout", "status", rollout)
        assert found["state"] in FINAL, found
        return dict(found)

    def await_phase(self, agent: Agent, phase: str, within_s: float = 60.0) -> None:
        """Returns as soon as the agent's log says that it is in `phase`."""

        def look() -> bool:
            return any(line["phase"] == phase for line in agent.events("phase.changed"))

        await_value(look, f"{agent.name} in {phase}", within_s)

    def phases(self, agent: Agent, name: str) -> list[str]:
        """What the agent's log says that it went through with releases of this name."""
        lines = agent.events("phase.changed")
        return [line["phase"] for line in lines if line["release"].rpartition("-")[0] == name]

    def device_id(self, agent: Agent) -> str:
        (device,) = self.fleet.operator("devices", "list", "--selector", f"name={agent.name}")
        return str(device["device_id"])

    def await_running(self, names: set[str], within_s: float = 60.0) -> None:
        await_value(lambda: self.running() == names, f"{names} on all devices", within_s, self.shop)

    def running(self) -> set[str]:
        """Names of the releases that the devices serve, without their digests."""
        devices = self.fleet.operator("devices", "list")
        return {d["running_release_id"].rpartition("-")[0] for d in devices}

    def ask(self, agent: Agent, variants: Sequence[str]) -> Survey:
        found = survey(agent, self.artifacts.cast, self.artifacts.built.digests(), variants)
        assert found.complaints == ()
        return found


@contextmanager
def open_stage(
    folder: Path, artifacts: Artifacts, offline_after_s: float = 45.0
) -> Iterator[Stage]:
    shutil.copytree(artifacts.folder / REPOSITORY, folder / REPOSITORY)
    with Workshop(folder, dict(ENVIRONMENT)) as shop:
        fleet = Fleet(shop, repository=REPOSITORY, sync_s=0.5, offline_after_s=offline_after_s)
        fleet.init()
        fleet.serve()
        yield Stage(shop, fleet, artifacts)
