"""The build host's part of the story: export, convert, publish.

Owns the artifacts' names and sizes. Knows nothing of devices.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from examples.demo.account import Account, size
from examples.demo.cast import Cast
from examples.demo.processes import Workshop
from examples.demo.text import chat
from remora_contract.adapter import Adapter, load_adapter
from remora_contract.bundle import load_bundle

CONTEXT = 256
BANK_RANK = 32
PRECISIONS = ("fp16", "int4")
REPOSITORY = "repository"


@dataclass(frozen=True)
class Artifact:
    directory: str
    name: str
    revision: str
    digest: str
    bytes: int

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.revision}"


@dataclass(frozen=True)
class Built:
    bundles: dict[str, Artifact]  # by precision
    adapters: dict[str, Artifact]  # by variant: first, second-1, second-2

    def digests(self) -> dict[str, str]:
        """Which digest must answer for each adapted variant."""
        return {variant: adapter.digest for variant, adapter in self.adapters.items()}


def export(shop: Workshop, account: Account, cast: Cast) -> dict[str, Artifact]:
    """Both precisions. The golden prompts are questions the model is asked later."""
    golden = _golden_options(shop, cast)
    found = {}
    for precision in PRECISIONS:
        out = f"bundles/{cast.model}-{precision}"
        quantized = ("--int4-block", "32") if precision == "int4" else ()
        done = shop.run(
            *("remora-build", "export", _typed(shop, cast.checkpoint), out, "--name", cast.model),
            *("--max-context", str(CONTEXT), "--max-bank-rank", str(BANK_RANK)),
            *(*quantized, *golden),
        )
        bundle = load_bundle(shop.folder / out)
        found[precision] = Artifact(out, cast.model, precision, bundle.digest, bundle.bytes)
        account.say(f"{size(bundle.bytes)} in {done.seconds:.1f} s")
    return found


def convert(shop: Workshop, account: Account, cast: Cast) -> dict[str, Artifact]:
    """Every PEFT directory, bound to the base by its digest: one adapter for all precisions."""
    base = f"bundles/{cast.model}-{cast.precision}"
    found, rows = {}, []
    for variant in (cast.first, f"{cast.second}-1", f"{cast.second}-2"):
        source, out = _typed(shop, cast.adapters / variant), f"sidecars/{variant}"
        shop.run("remora-build", "adapter", source, out, "--base", base)
        adapter = load_adapter(shop.folder / out)
        name, _, revision = variant.partition("-")
        found[variant] = Artifact(out, name, revision or "1", adapter.digest, adapter.bytes)
        rows.append(_row(variant, adapter))
    account.table(("ADAPTER", ">SIZE", ">RANK", "PROJECTIONS"), rows)
    return found


def publish(shop: Workshop, artifact: Artifact) -> None:
    shop.run(
        *("remora-build", "publish", artifact.directory, REPOSITORY),
        *("--name", artifact.name, "--revision", artifact.revision),
    )


def _golden_options(shop: Workshop, cast: Cast) -> tuple[str, ...]:
    """Three questions of the demo's own world; another checkpoint takes the built-in sentences."""
    if cast.model != "world":
        return ()
    lines = [json.dumps({"text": chat(question)}) for question in cast.questions[4::20]]
    (shop.folder / "golden.jsonl").write_text("\n".join(lines) + "\n")
    return ("--golden", "golden.jsonl")


def _row(variant: str, adapter: Adapter) -> tuple[str, str, str, str]:
    return variant, size(adapter.bytes), str(adapter.rank), ", ".join(adapter.projections())


def _typed(shop: Workshop, path: Path) -> str:
    """As a user in the folder would write it."""
    return str(path.relative_to(shop.folder) if path.is_relative_to(shop.folder) else path)
