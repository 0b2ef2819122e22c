"""Bundles with TensorRT Edge-LLM's engines, as a host takes them: checked, proven in a process of
their own, opened. There is nothing to build: the engine folder came out of Edge-LLM's own builder.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from remora_agent.edgellm.bundle import Answer, EdgeBundle
from remora_agent.edgellm.child import Child, Patience
from remora_agent.edgellm.convert import refuse_adapter, write_adapter
from remora_agent.edgellm.loaded import key_of
from remora_agent.edgellm.model import EdgeModel
from remora_agent.edgellm.module import BACKEND, require_installed
from remora_agent.edgellm.request import CANNOT_DEFAULT, refuse_mix
from remora_agent.engine.protocol import Engine
from remora_agent.host import Assignment, BuildOutcome, Progress
from remora_agent.runtime.api import AdapterRef
from remora_agent.runtime.options import RuntimeOptions
from remora_contract.adapter import load_adapter
from remora_contract.bundle import verify_files
from remora_contract.engine import EngineKey, Wanted
from remora_contract.errors import Cancelled, EngineFault, Refusal, Unsupported
from remora_contract.experiments import arm_mix
from remora_contract.gates import GoldenQuestion
from remora_contract.trt_memory import GpuMemory

_SPARE_TOKENS = 16  # that an answer may be longer than what is expected, before it counts as other
_SHOWN = 80
_BY_TEXT = ("exact", "prefix")


class EdgeEngines:
    """An EngineSource and a ModelOpener."""

    def __init__(
        self, cancelled: Callable[[], bool] = lambda: False, patience: Patience | None = None
    ) -> None:
        """Raises Unsupported where the wheel is not installed."""
        require_installed()
        self._cancelled = cancelled
        self._patience = patience or Patience()

    # -- ModelOpener ------------------------------------------------------------------------------

    def check(self, assignment: Assignment) -> None:
        """Raises Unsupported naming the adapter, use case, default, experiment or question."""
        release = assignment.release_id
        for adapter in assignment.adapters:
            refuse_adapter(adapter.name, adapter.directory)
        for use_case in assignment.use_cases:
            mix = tuple(AdapterRef(a.name, None, a.weight) for a in use_case.adapters)
            refuse_mix(mix, f"use case {use_case.name} of {release}")
        for name in CANNOT_DEFAULT:
            if getattr(assignment.sampling, name) is not None:
                raise Unsupported(
                    f"sampling default {name} of {release}: backend {BACKEND} has no such field"
                )
        _check_arms(assignment)
        for question in assignment.golden:
            if question.kind not in _BY_TEXT or question.tokens:
                raise Unsupported(
                    f"golden question {question.name}: backend {BACKEND} answers texts alone; ask "
                    "a text for exact or prefix"
                )

    def open(
        self, assignment: Assignment, options: RuntimeOptions, free_bytes: Callable[[], int]
    ) -> EdgeModel:
        opened = EdgeBundle.load(assignment.bundle_directory)
        return EdgeModel(opened, options, assignment.sampling, assignment.adapters, self._patience)

    # -- EngineSource -----------------------------------------------------------------------------

    def build(
        self,
        bundle_dir: Path,
        progress: Progress,
        shipped: Sequence[Path] = (),
        adapter_dirs: Sequence[Path] = (),
    ) -> BuildOutcome:
        """The engine is the bundle's own, verified. Raises ArtifactInvalid, and as
        `EdgeBundle.load`."""
        started = time.monotonic()
        opened = EdgeBundle.load(bundle_dir)
        progress("verifying the engine", 0.0)
        verify_files(bundle_dir, opened.bundle.files)
        seconds = time.monotonic() - started
        return BuildOutcome(opened.engine_digest, from_cache=True, seconds=seconds)

    def key(self) -> Mapping[str, str]:
        """Nothing is built here, so nothing is shared."""
        return {}

    def gpu_memory(self) -> GpuMemory | None:
        """What an engine of its takes is its own runtime's to know."""
        return None

    def wanted(self, bundle_dir: Path) -> Wanted | None:
        return None

    def missing(self, bundle_dir: Path) -> EngineKey | None:
        return None

    def take(
        self, bundle_dir: Path, staged: Path, adapter_dirs: Sequence[Path], progress: Progress
    ) -> str:
        return f"backend {BACKEND} takes no engine that another device built"

    def built(self, bundle_dir: Path) -> Path | None:
        return None

    def probe(self, bundle_dir: Path, adapter_dirs: Sequence[Path], progress: Progress) -> None:
        """One token of the base model and of each adapter."""
        opened = EdgeBundle.load(bundle_dir)
        progress("opening the engine", 0.0)
        with self._proving(opened, adapter_dirs) as child:
            for adapter in ("", *(key_of(load_adapter(d).digest) for d in adapter_dirs)):
                opened.answer_of(child, opened.probe_prompt, adapter, 1)

    def ask(self, assignment: Assignment, incumbent: Assignment | None, progress: Progress) -> None:
        opened = EdgeBundle.load(assignment.bundle_directory)
        keys = _keys(assignment)
        directories = [a.directory for a in assignment.adapters]
        with self._proving(opened, directories) as child:
            for i, question in enumerate(assignment.golden):
                progress("asking golden questions", i / len(assignment.golden))
                _ask(opened, child, question, keys)

    def load(self, bundle_dir: Path) -> Engine:
        raise Unsupported(f"backend {BACKEND} has no steps: use it with serve or run")

    def memory_refusals(self, bundle_dir: Path, available_bytes: int) -> list[Refusal]:
        """It does not say what it takes, so no second one is opened beside the first."""
        return [Refusal("memory", "a runtime that says what it takes", f"backend {BACKEND}")]

    @contextmanager
    def _proving(self, opened: EdgeBundle, adapter_dirs: Sequence[Path]) -> Iterator[Child]:
        def look() -> None:
            if self._cancelled():
                raise Cancelled("proving the release was interrupted")

        with tempfile.TemporaryDirectory(prefix="remora-edgellm-prove-") as folder:
            files = {}
            for directory in adapter_dirs:
                key = key_of(load_adapter(directory).digest)
                files[key] = write_adapter(directory, opened.bundle, Path(folder) / key)
            child = Child(opened.engine_directory, files, self._patience, look)
            try:
                yield child
            finally:
                child.close()


def _check_arms(assignment: Assignment) -> None:
    digests = {a.name: a.digest for a in assignment.adapters}
    use_cases = {u.name: [(a.name, a.weight) for a in u.adapters] for u in assignment.use_cases}
    for experiment in assignment.experiments:
        where = f"experiment {experiment.name} of {assignment.release_id}"
        if experiment.shadow is not None:
            raise Unsupported(f"{where}: backend {BACKEND} has no logprobs to compare a shadow by")
        for arm in experiment.arms:
            mix = arm_mix(arm, digests, use_cases)
            refuse_mix(tuple(AdapterRef(name, None, weight) for name, weight in mix), where)


def _keys(assignment: Assignment) -> dict[str, str]:
    """Of what a question may be asked to: adapters and use cases; empty for the base model."""
    keys = {a.name: key_of(a.digest) for a in assignment.adapters}
    mixes = {u.name: [keys[a.name] for a in u.adapters] for u in assignment.use_cases}
    return keys | {name: mix[0] if mix else "" for name, mix in mixes.items()}


def _ask(
    opened: EdgeBundle, child: Child, question: GoldenQuestion, keys: Mapping[str, str]
) -> None:
    """Raises EngineFault for another answer than expected, Unsupported for a name that the release
    does not have."""
    name = question.use_case
    if name is not None and name not in keys:
        raise Unsupported(
            f"golden question {question.name} is for {name}, which the release does not have"
        )
    key = "" if name is None else keys[name]
    wanted, ids = question.expected_text, question.expected_tokens
    expected = len(ids) or len(opened.text.encode(wanted or "").token_ids)
    most = expected if ids else expected + _SPARE_TOKENS
    answer = opened.answer_of(child, question.text or "", key, most)
    if not _is_right(question, answer):
        need = repr((wanted or "")[:_SHOWN]) if not ids else str(list(ids))
        have = repr(answer.text[:_SHOWN]) if not ids else str(list(answer.ids))
        raise EngineFault(f"golden question {question.name}: the answer is {have}, not {need}")


def _is_right(question: GoldenQuestion, answer: Answer) -> bool:
    if question.expected_tokens:
        return answer.ids[: len(question.expected_tokens)] == question.expected_tokens
    wanted = question.expected_text or ""
    return answer.text == wanted if question.kind == "exact" else answer.text.startswith(wanted)
