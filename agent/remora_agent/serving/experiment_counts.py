"""What each arm of an experiment did, and how a shadow agreed with its incumbent: counts that only
grow, under EXPERIMENT/ARM/IDENTITY, so that another adapter under the arm's name begins anew.

Counts and sums alone: no text, no token and no session is kept here. Only what the release that
serves declares is told, which bounds the series.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping

from remora_agent.bank.directory import Declared
from remora_agent.runtime.api import (
    Event,
    Failed,
    Finished,
    FinishReason,
    OnEvent,
    Provenance,
    ServedArm,
)
from remora_contract.experiments import ARM_COUNTS, ARM_PREFIX, SHADOW_COUNTS, SHADOW_PREFIX

MAX_KEPT = 64  # arms whose counts are kept, those told last first
_Key = tuple[str, str, str]  # experiment, arm, identity


class ExperimentCounts:
    """Thread-safe. Lives as long as the process, over switches of models."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arms: dict[_Key, Counter[str]] = {}

    def listening(self, is_keyed: bool, on_event: OnEvent) -> OnEvent:
        """`on_event` behind a listener that counts the request for the arm that answered it, as
        long as that ran what the release says."""
        provenance: Provenance | None = None

        def listen(event: Event) -> None:
            nonlocal provenance
            if not isinstance(event, Failed):
                provenance = getattr(event, "provenance", provenance)
            if isinstance(event, Finished | Failed) and provenance is not None:
                self._ended(provenance, event, is_keyed)
            on_event(event)

        return listen

    def add(self, arm: ServedArm, more: Mapping[str, float]) -> None:
        """Names are those of the contract, with their prefix."""
        key = (arm.experiment, arm.name, arm.identity)
        with self._lock:
            counts = self._arms.pop(key, Counter())
            counts.update(more)  # sums of seconds too
            self._arms[key] = counts
            while len(self._arms) > MAX_KEPT:
                del self._arms[next(iter(self._arms))]

    def metrics(self, declared: Iterable[Declared]) -> dict[str, float]:
        """`experiment_requests.EXPERIMENT/ARM/IDENTITY` and so on, zeros too: a count that is
        there from the beginning shows its first growth."""
        told = {}
        with self._lock:
            for one in declared:
                shadow = one.experiment.shadow
                for arm, identity in one.identities.items():
                    counts = self._arms.get((one.experiment.name, arm, identity), Counter())
                    names = [ARM_PREFIX + name for name in ARM_COUNTS]
                    if shadow is not None and arm == shadow.candidate:
                        names += [SHADOW_PREFIX + name for name in SHADOW_COUNTS]
                    label = f"{one.experiment.name}/{arm}/{identity}"
                    told.update({f"{name}.{label}": float(counts[name]) for name in names})
        return told

    def _ended(self, provenance: Provenance, event: Finished | Failed, is_keyed: bool) -> None:
        arm = provenance.arm
        if arm is None or arm.mix != tuple((a.digest, a.weight) for a in provenance.adapters):
            return  # somebody moved a name on the device: these are not the arm's bytes
        more: dict[str, float] = {"requests": 1, "unkeyed": not is_keyed}
        if isinstance(event, Failed):
            more["failures"] = 1
        elif event.reason is FinishReason.CANCELLED:
            # Else an arm that nobody waits for would look fast.
            more["cancelled"] = 1
        else:
            timings = event.timings
            more["tokens"] = event.usage.completion_tokens
            more["first_token_seconds"] = timings.time_to_first_token_s
            more["answer_seconds"] = timings.queue_s + timings.prefill_s + timings.decode_s
        self.add(arm, {ARM_PREFIX + name: value for name, value in more.items()})
