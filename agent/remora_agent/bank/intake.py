"""From disk into host memory: what is read next, what was read, what could not be. Knows no bank.
One thread uses it but for `read_ahead`; the reading is the loader's, on its own."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence

from remora_agent.bank.directory import Registered
from remora_agent.bank.host import HostCache
from remora_agent.bank.loader import Loads
from remora_agent.bank.reading import plan_reads
from remora_agent.bank.weights import AdapterWeights
from remora_contract.errors import RemoraError

log = logging.getLogger(__name__)


class Intake:
    def __init__(self, host: HostCache, loader: Loads) -> None:
        self._host = host
        self._loader = loader
        self._keep: frozenset[str] = frozenset()  # host memory does not drop these
        self._failures: dict[str, RemoraError] = {}

    def prefetch(self, mixes: Sequence[Sequence[Registered]], residents: Collection[str]) -> None:
        """Starts reading what these will need, first come first, as far as host memory goes."""
        adapters = {a.digest: a for mix in mixes for a in mix}
        bytes_of = [{a.digest: a.bank_bytes for a in mix} for mix in mixes]
        reads, self._keep = plan_reads(
            bytes_of, residents, self._host.digests(), self._host.capacity_bytes
        )
        for digest in reads:
            self._loader.start(adapters[digest])

    def read_ahead(self, adapter: Registered) -> None:
        """Starts reading what `prefetch` will soon be asked for. Any thread."""
        self._loader.start(adapter)

    def loaded(self, digest: str, result: AdapterWeights | RemoraError) -> None:
        self._loader.finished(digest)
        if isinstance(result, RemoraError):
            self._failures[digest] = result
        elif not self._host.put(result, self._keep):
            log.info("adapter.dropped", extra={"digest": digest, "bytes": result.bank_bytes})

    def drop(self, digest: str) -> None:
        """It was unloaded: its memory is wanted for something else."""
        self._host.drop(digest)
        self._loader.freed()

    def take_failures(self) -> Mapping[str, RemoraError]:
        failures, self._failures = self._failures, {}
        return failures
