"""What no device could honour of a release, whatever the device: asked before a release is made,
by plans of older ones, and by the device before it fetches. Pure; all refusals at once.
"""

from __future__ import annotations

from collections.abc import Iterator

from remora_contract.errors import Refusal
from remora_contract.release import Constraints, Release, SamplingDefaults
from remora_contract.sampling_bounds import LENGTHS, RANGES
from remora_contract.versions import version_numbers

# Those that agents have, see `remora_agent.control.facts`.
BACKENDS = ("onnxruntime", "tensorrt", "tensorrt_rtx", "edgellm")


def document_refusals(release: Release) -> list[Refusal]:
    """Empty when every value can be honoured."""
    return [
        *_sampling_refusals(release.sampling),
        *_constraint_faults(release.constraints),
    ]


def unknown_backends(wants: Constraints) -> list[Refusal]:
    """Names that no agent has: a slip of the pen. Asked where a release is made only: a device may
    be older than a backend that another device has."""
    named = {*wants.backends, *(wants.min_backend_versions or {}), *(wants.backend_versions or {})}
    unknown = sorted(named - set(BACKENDS))
    return [Refusal("constraints.backends", " or ".join(BACKENDS), name[:40]) for name in unknown]


def _sampling_refusals(sampling: SamplingDefaults) -> Iterator[Refusal]:
    for name, allowed in {**RANGES, **LENGTHS}.items():
        value = getattr(sampling, name)
        if value is not None and not allowed.holds(value):
            yield Refusal(f"sampling.{name}", allowed.described(), f"{value:g}")
    least, most = sampling.min_tokens, sampling.max_tokens
    if least is not None and most is not None and least > most:
        yield Refusal("sampling.min_tokens", f"at most max_tokens, {most}", str(least))


def _constraint_faults(wants: Constraints) -> Iterator[Refusal]:
    if wants.min_memory_bytes is not None and wants.min_memory_bytes < 0:
        yield Refusal("constraints.min_memory_bytes", "0 or more", str(wants.min_memory_bytes))
    version = wants.min_agent_version
    if version is not None and not version_numbers(version):
        need = "a version such as 0.3 (agent_version takes ranges, such as '>=0.3,<0.5')"
        yield Refusal("constraints.min_agent_version", need, version[:40])
