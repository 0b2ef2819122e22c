"""A second model of the same fleet: the same vocabulary, eight times as many layers. Its answers
are other ones and take several times as long: real work, no delay."""

from __future__ import annotations

from pathlib import Path

from examples.demo.build import REPOSITORY
from examples.demo.processes import Workshop
from tests.end_to_end.stage import ENVIRONMENT, Artifacts

DEEP = "deep"


def publish_deep(folder: Path, artifacts: Artifacts) -> None:
    """Into the repository of all tests, from a checkpoint made in `folder`."""
    from tests.support.checkpoints import make_checkpoint

    make_checkpoint(
        folder / "checkpoint",
        "qwen3",
        hidden=256,
        heads=4,
        head_dim=64,
        kv_heads=2,
        intermediate=512,
        layers=16,
        seed=12,
    )
    shop = Workshop(folder, dict(ENVIRONMENT))
    shop.run("remora-build", "export", "checkpoint", "bundle", "--dtype", "float32")
    repository = str(artifacts.folder / REPOSITORY)
    shop.run("remora-build", "publish", "bundle", repository, "--name", DEEP)
