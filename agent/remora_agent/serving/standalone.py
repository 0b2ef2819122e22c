"""`remora-agent serve`: one bundle and its adapters given by hand, no controller."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from remora_agent.host import AssignedAdapter, Assignment, Progress
from remora_agent.serving.address import Address, UnixAddress
from remora_agent.serving.descriptors import raise_limit
from remora_agent.serving.progress import shown
from remora_agent.serving.stack import ServingStack, StackOptions
from remora_contract.adapter import load_adapter
from remora_contract.artifact import check_name
from remora_contract.bundle import load_bundle
from remora_contract.digests import short
from remora_contract.errors import ArtifactInvalid, Cancelled, InternalFault, RequestInvalid
from remora_contract.release import ReleaseUseCase, WeightedName, check_use_cases
from remora_contract.systemd_notify import READY, STOPPING, WATCHDOG, notify, watchdog_interval_s
from remora_contract.use_cases import load_use_cases

log = logging.getLogger(__name__)

RELEASE_ID = "standalone"
_CHECK_S = 1.0  # between two looks at the step thread
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class StandaloneOptions:
    stack: StackOptions
    drain_s: float = 20.0


def run(assignment: Assignment, options: StandaloneOptions, say: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT, then drains. Raises InternalFault when the engine stops
    answering, and what building and opening raise. `say` gets the one line for people."""
    stop = threading.Event()
    raise_limit()
    with signals_set(stop):
        stack = ServingStack(options.stack, stop.is_set)
        address = stack.start()
        try:
            with shown(sys.stderr) as progress:
                open_model(stack, assignment, progress)
            announce(
                headline(assignment, address) + also_on(stack.openai_address, options.stack), say
            )
            notify(READY)
            watch(stack, stop)
        except Cancelled:
            log.info("serve.interrupted")
        finally:
            notify(STOPPING)
            stack.stop(options.drain_s)


def announce(line: str, say: Callable[[str], None]) -> None:
    """Serving does not depend on whether its output can be written, to a full disk, say."""
    try:
        say(line)
    except OSError as e:
        log.warning("serve.unheard", extra={"line": line, "error": e.strerror or str(e)})


def open_model(stack: ServingStack, assignment: Assignment, progress: Progress) -> None:
    stack.host.build(assignment, progress)
    progress("loading", 0.0)
    stack.host.switch(assignment)


def watch(stack: ServingStack, stop: threading.Event) -> None:
    """Until `stop`; feeds systemd's watchdog only while the step thread really moves."""
    interval_s = min(watchdog_interval_s() or _CHECK_S, _CHECK_S)
    while not stop.wait(interval_s):
        if not stack.host.healthy():
            raise InternalFault("the engine no longer answers; the log says why. Start again")
        notify(WATCHDOG)


@contextmanager
def signals_set(stop: threading.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set `stop`; a second one has its usual effect."""

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(number, previous[number])
        stop.set()

    previous: dict[int, Any] = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def headline(assignment: Assignment, address: Address) -> str:
    name = load_bundle(assignment.bundle_directory).source.name
    adapters = ", ".join(a.name for a in assignment.adapters) or "no adapters"
    return f"serving {name} ({short(assignment.bundle_digest)}; {adapters}) on {address.target()}"


def also_on(address: Address | None, options: StackOptions) -> str:
    """Where the HTTP surface is, as clients write it; empty when it is off."""
    if address is None:
        return ""
    if isinstance(address, UnixAddress):
        return f" and HTTP on {address.target()}"
    scheme = "https" if options.openai is not None and options.openai.tls is not None else "http"
    return f" and {scheme}://{address.target()}/v1"


def local_assignment(
    bundle: Path,
    adapters: dict[str, Path],
    use_cases: Sequence[ReleaseUseCase],
    document: Path | None = None,
) -> Assignment:
    """What the command line asks for; `document` is a use_cases.json or the directory of one.

    Raises ArtifactInvalid, DocumentInvalid, RequestInvalid.
    """
    bundle = bundle.resolve()
    assigned = [_assigned(name, directory) for name, directory in adapters.items()]
    compositions = tuple(use_cases)
    if document is not None:
        more, named = _of_document(document)
        assigned, compositions = [*assigned, *more], (*compositions, *named)
    names = [a.name for a in assigned]
    for name in names:
        if names.count(name) > 1:
            raise RequestInvalid(f"adapter {name} is given by --adapter and by {document}")
    _check_compositions(compositions, names)
    digest = load_bundle(bundle).digest
    return Assignment(RELEASE_ID, digest, bundle, tuple(assigned), compositions)


def _assigned(name: str, directory: Path) -> AssignedAdapter:
    digest = load_adapter(directory).digest
    check_name(name, "adapter name")
    return AssignedAdapter(name, short(digest), digest, directory.resolve())


def _of_document(path: Path) -> tuple[list[AssignedAdapter], tuple[ReleaseUseCase, ...]]:
    document, home = load_use_cases(path)
    assigned = []
    for entry in document.adapters:
        directory = home / (entry.directory or entry.name)
        adapter = _assigned(entry.name, directory)
        if adapter.digest != entry.digest:
            raise ArtifactInvalid(
                f"{directory} holds adapter {adapter.revision}, {path} lists "
                f"{short(entry.digest or '')}; convert the use cases again"
            )
        assigned.append(adapter)
    return assigned, document.release_use_cases()


def _check_compositions(use_cases: Sequence[ReleaseUseCase], adapters: list[str]) -> None:
    for use_case in use_cases:
        for used in use_case.adapters:
            if used.name not in adapters:
                raise RequestInvalid(
                    f"use case {use_case.name} names adapter {used.name}, "
                    f"which no --adapter {used.name}=DIR gives"
                )
    try:
        check_use_cases(use_cases, adapters)
    except ValueError as e:
        raise RequestInvalid(str(e)) from e


def parse_adapters(texts: list[str]) -> dict[str, Path]:
    """`NAME=DIR` each. Raises RequestInvalid."""
    adapters: dict[str, Path] = {}
    for text in texts:
        name, separator, directory = text.partition("=")
        if not separator or not directory:
            raise RequestInvalid(f"--adapter {text[:80]!r}: give NAME=DIR")
        if name in adapters:
            raise RequestInvalid(f"--adapter {name}: the name is given twice")
        adapters[name] = Path(directory)
    return adapters


def parse_use_case(text: str) -> ReleaseUseCase:
    """`NAME=A:0.7,B:0.3`; a missing weight is 1. Raises RequestInvalid."""
    name, separator, mix = text.partition("=")
    if not separator or not mix:
        raise RequestInvalid(f"--use-case {text[:80]!r}: give NAME=ADAPTER:WEIGHT[,…]")
    return ReleaseUseCase(name, tuple(_weighted(part, text) for part in mix.split(",")))


def _weighted(part: str, text: str) -> WeightedName:
    name, separator, weight = part.partition(":")
    if not name:
        raise RequestInvalid(f"--use-case {text[:80]!r}: give NAME=ADAPTER:WEIGHT[,…]")
    try:
        return WeightedName(name, float(weight) if separator else 1.0)
    except ValueError as e:
        raise RequestInvalid(f"--use-case {text[:80]!r}: {weight!r} is no weight") from e
