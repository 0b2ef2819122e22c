"""A serving stack on the reference engine, with real bundle and adapter directories."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from remora_agent.engine.protocol import Engine
from remora_agent.host import AssignedAdapter, Assignment, BuildOutcome, Progress
from remora_agent.hosting.engines import EngineSettings
from remora_agent.local_host import HostSettings
from remora_agent.serving.address import parse_address
from remora_agent.serving.stack import ServingStack, StackOptions
from remora_contract.adapter import load_adapter
from remora_contract.bundle import BUNDLE_JSON, Bundle, BundleFile, SourceInfo, load_bundle
from remora_contract.digests import canonical_json, digest_bytes, digest_file
from remora_contract.engine import Wanted
from remora_contract.errors import EngineFault, Refusal
from remora_contract.release import ReleaseUseCase, WeightedName
from remora_contract.trt_memory import GpuMemory
from tests.support.adapters import random_tensors, write_sidecar
from tests.support.reference_engine import ReferenceEngine
from tests.support.runtime import VOCAB, byte_tokenizer, make_bundle

TEMPLATE = (
    "{% if enable_thinking %}T{% endif %}"
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
MAX_RANK = 64


def write_bundle(
    directory: Path,
    name: str = "tiny",
    context: int = 256,
    template: str = TEMPLATE,
    special: str = "<pad>",
) -> Bundle:
    """bundle.json and a byte tokenizer with a chat template; no graph: the engine is a reference.

    Bundles of different names have different digests and the same base. `special` is the text of
    the tokenizer's last special token.
    """
    tokenizer = directory / "tokenizer"
    tokenizer.mkdir(parents=True)
    byte_tokenizer(special).save(str(tokenizer / "tokenizer.json"))
    config = {"chat_template": template}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    files = tuple(
        BundleFile(f"tokenizer/{p.name}", p.stat().st_size, digest_file(p))
        for p in sorted(tokenizer.iterdir())
    )
    plain = make_bundle(context, MAX_RANK)
    source = SourceInfo(name, "llama", "float32")
    bundle = replace(plain, files=(*plain.files, *files), source=source)
    (directory / BUNDLE_JSON).write_bytes(canonical_json(bundle))
    return bundle


def write_adapter(directory: Path, bundle: Bundle, seed: int, rank: int = 4) -> Path:
    tensors = random_tensors(bundle.decoder, seed=seed, r=rank, projections=("q", "v"))
    write_sidecar(directory, bundle.base_digest, tensors)
    return directory


class ReferenceEngines:
    """An EngineSource. `gate` blocks every engine step while it is cleared; `refuse` names what
    `load` raises for a bundle's name; `fits` is the answer about memory."""

    def __init__(self, rows: int = 4) -> None:
        self.rows = rows
        self.gate = threading.Event()
        self.gate.set()
        self.fits = True
        self.refuse: dict[str, EngineFault] = {}
        self.opened: list[ReferenceEngine] = []
        self.probed: list[Path] = []
        self.asked: list[tuple[str, str | None]] = []

    def build(
        self,
        bundle_dir: Path,
        progress: Progress,
        shipped: Sequence[Path] = (),
        adapter_dirs: Sequence[Path] = (),
    ) -> BuildOutcome:
        progress("building", 1.0)
        return BuildOutcome(digest_bytes(b"reference engine"), True, 0.0)

    def key(self) -> dict[str, str]:
        return {"backend": "reference"}

    def gpu_memory(self) -> GpuMemory | None:
        return None

    def wanted(self, bundle_dir: Path) -> Wanted | None:
        return None

    def probe(self, bundle_dir: Path, adapter_dirs: Sequence[Path], progress: Progress) -> None:
        self.probed.append(bundle_dir)

    def ask(self, assignment: Assignment, incumbent: Assignment | None, progress: Progress) -> None:
        self.asked.append((assignment.release_id, incumbent.release_id if incumbent else None))

    def load(self, bundle_dir: Path) -> Engine:
        bundle = load_bundle(bundle_dir)
        if error := self.refuse.get(bundle.source.name):
            raise error
        engine = ReferenceEngine(self.rows, bundle.graph.context, VOCAB, MAX_RANK)
        engine.before_step = lambda: self._pass(engine)
        self.opened.append(engine)
        return engine

    def _pass(self, engine: ReferenceEngine) -> None:
        """The first step is the probe of an engine that nobody uses yet."""
        if len(engine.calls.prefills) > 1 or engine.calls.decodes:
            self.gate.wait(30)

    def memory_refusals(self, bundle_dir: Path, available_bytes: int) -> list[Refusal]:
        return [] if self.fits else [Refusal("memory", "more", "less")]


class World:
    """Bundles and adapters below one folder, and assignments made of them."""

    def __init__(self, root: Path, context: int = 256) -> None:
        self.root = root
        self.context = context
        self.bundles: dict[str, Bundle] = {}
        self.adapters: dict[tuple[str, str], AssignedAdapter] = {}

    def bundle(self, name: str) -> Bundle:
        if name not in self.bundles:
            self.bundles[name] = write_bundle(self.root / "b" / name, name, self.context)
        return self.bundles[name]

    def adapter(self, name: str, revision: str = "r1", rank: int = 4) -> AssignedAdapter:
        key = (name, revision)
        if key not in self.adapters:
            directory = self.root / "a" / f"{name}-{revision}"
            seed = int.from_bytes(digest_bytes(f"{name}@{revision}".encode())[7:15].encode(), "big")
            write_adapter(directory, self.bundle("base"), seed, rank)
            digest = load_adapter(directory).digest
            self.adapters[key] = AssignedAdapter(name, revision, digest, directory)
        return self.adapters[key]

    def assignment(
        self,
        release_id: str = "one",
        bundle: str = "base",
        adapters: Sequence[tuple[str, str]] = (),
        use_cases: dict[str, dict[str, float]] | None = None,
    ) -> Assignment:
        """`adapters` as (name, revision)."""
        digest = self.bundle(bundle).digest
        made = tuple(
            ReleaseUseCase(name, tuple(WeightedName(a, w) for a, w in mix.items()))
            for name, mix in (use_cases or {}).items()
        )
        return Assignment(
            release_id,
            digest,
            self.root / "b" / bundle,
            tuple(self.adapter(n, r) for n, r in adapters),
            made,
        )


@contextmanager
def running_stack(
    tmp_path: Path,
    engines: ReferenceEngines,
    listen: str = "127.0.0.1:0",
    host: HostSettings | None = None,
    **options: object,
) -> Iterator[tuple[ServingStack, str]]:
    """A started stack without a model and its address, stopped afterwards."""
    settings = StackOptions(
        listen=parse_address(listen),
        engines=EngineSettings(cache_dir=tmp_path / "engines"),
        host=host or HostSettings(),
        **options,  # type: ignore[arg-type]
    )
    stack = ServingStack(settings, engines=engines)
    address = stack.start().target()
    try:
        yield stack, address
    finally:
        engines.gate.set()
        stack.stop(5.0)
