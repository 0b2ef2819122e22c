"""`python -m remora_agent.engine.golden_child PIPE TASK_FILE`: golden questions in a child process.

The new release is asked first and closed; only then, and only where a question compares with it,
the incumbent's engine is opened once more beside the one that serves.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remora_agent.bank.weights import load_weights
from remora_agent.engine.cache import read_entry
from remora_agent.engine.child_side import child_main
from remora_agent.engine.golden import Asked, ask, compare_surprise, mixes_of, surprise
from remora_agent.engine.one_row import OneRow
from remora_agent.engine.opening import load_engine
from remora_agent.engine.protocol import MixEntry
from remora_agent.host import Progress
from remora_agent.text.pipeline import MAX_TEXT_BYTES
from remora_agent.text.tokenizer import TextTokenizer
from remora_contract.adapter import load_adapter
from remora_contract.bundle import TOKENIZER_DIR, load_bundle
from remora_contract.errors import Unsupported
from remora_contract.gates import GoldenQuestion
from remora_contract.release import ReleaseUseCase
from remora_contract.strict import loads


@dataclass(frozen=True)
class Side:
    engine_directory: str
    bundle_directory: str
    adapters: dict[str, str]  # name -> directory
    use_cases: tuple[ReleaseUseCase, ...]
    options: OneRow


@dataclass(frozen=True)
class Task:
    questions: tuple[GoldenQuestion, ...]
    new: Side
    incumbent: Side | None = None  # None: nothing serves yet, so there is nothing to compare with


def answer(task: Task, progress: Progress) -> dict[str, Any]:
    """How many questions were asked and compared. Raises what `golden` and loading raise."""
    scored = [q for q in task.questions if q.kind == "perplexity"]
    if task.incumbent is not None:
        _check_comparable(scored, task.new, task.incumbent)
    new: dict[str, float] = {}
    with _opened(task.new, task.questions) as side:
        for i, question in enumerate(task.questions):
            progress("asking golden questions", 0.5 * i / len(task.questions))
            if question.kind == "perplexity":
                new[question.name] = surprise(side, question)
            else:
                ask(side, question)
    if scored and task.incumbent is not None:
        with _opened(task.incumbent, scored) as side:
            for question in scored:
                progress("asking the incumbent", 0.9)
                compare_surprise(question, new[question.name], surprise(side, question))
    return {"asked": len(task.questions), "compared": len(scored) if task.incumbent else 0}


def _check_comparable(scored: list[GoldenQuestion], new: Side, incumbent: Side) -> None:
    """Raises Unsupported: token ids mean something else to another tokenizer."""
    by_ids = [q for q in scored if q.tokens]
    if by_ids and _tokenizer_digest(new) != _tokenizer_digest(incumbent):
        raise Unsupported(
            f"golden question {by_ids[0].name} scores token ids, and the release that serves has "
            "another tokenizer; give its text instead"
        )


def _tokenizer_digest(side: Side) -> str:
    files = load_bundle(Path(side.bundle_directory)).files
    return next(f.digest for f in files if f.path == f"{TOKENIZER_DIR}/tokenizer.json")


@contextmanager
def _opened(side: Side, questions: Sequence[GoldenQuestion]) -> Iterator[Asked]:
    directory = Path(side.bundle_directory)
    bundle = load_bundle(directory)
    entry = read_entry(Path(side.engine_directory))
    engine = load_engine(entry, bundle, side.options.options())
    try:
        use_cases = {u.name: [(a.name, a.weight) for a in u.adapters] for u in side.use_cases}
        handles = {}
        for name in sorted(_adapters_used(questions, use_cases) & set(side.adapters)):
            folder = Path(side.adapters[name])
            _check_always_active(name, folder)
            handles[name] = engine.add_adapter(load_weights(folder, bundle))
        tokenizer = TextTokenizer.load(directory / TOKENIZER_DIR, MAX_TEXT_BYTES)
        yield Asked(
            engine,
            lambda text: tokenizer.encode(text, add_special_tokens=True),
            tokenizer.decode,
            frozenset(bundle.eos_token_ids),
            mixes_of(handles, use_cases, lambda handle, weight: (MixEntry(handle, weight),)),
        )
    finally:
        engine.close()


def _adapters_used(
    questions: Sequence[GoldenQuestion], use_cases: dict[str, list[tuple[str, float]]]
) -> set[str]:
    names = {q.use_case for q in questions if q.use_case is not None}
    return {a for name in names for a, _ in use_cases.get(name, [(name, 1.0)])}


def _check_always_active(name: str, folder: Path) -> None:
    """Raises Unsupported: an activated adapter answers only after its invocation."""
    if load_adapter(folder).invocation_tokens:
        raise Unsupported(
            f"golden questions to adapter {name}, which acts only after its invocation tokens, are "
            "not implemented; ask the base model or another adapter"
        )


def main() -> int:
    descriptor, path = sys.argv[1:]
    task = loads(Task, Path(path).read_bytes(), path)
    return child_main(int(descriptor), lambda progress: answer(task, progress))


if __name__ == "__main__":
    sys.exit(main())
