"""Does a built engine answer as the graph it was built from? Decided before it serves.

Checks are teacher-forced: the recorded tokens are fed whatever the engine answers, so one near-tie
cannot cascade. An engine computes in another numeric form than the recording; how far its logits
may move is stated here, and only a token that this cannot explain is a fault.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from remora_agent.engine.build import ignore, never
from remora_agent.engine.cache import CacheEntry
from remora_agent.engine.child import ChildLimits, run_child
from remora_agent.engine.one_row import OneRow
from remora_agent.engine.opening import EngineOptions
from remora_agent.engine.protocol import Engine, Mix, RowStep
from remora_agent.host import Progress
from remora_contract.bundle import GOLDEN_JSON, Bundle, read_document
from remora_contract.digests import canonical_json
from remora_contract.errors import EngineFault
from remora_contract.golden import Golden, GoldenPrompt
from remora_contract.strict import loads

log = logging.getLogger(__name__)

_CHILD = "remora_agent.engine.probe_child"


@dataclass(frozen=True)
class Tolerance:
    """How far a logit may move, in units of the spread (standard deviation) of the logits, and the
    share of the checked positions that may lie further apart."""

    spreads: float
    outliers: float = 0.0

    def absolute(self, logits: NDArray[np.float32]) -> float:
        return self.spreads * float(logits.std())


FLOAT32_TOLERANCE = Tolerance(1e-3)
FLOAT16_TOLERANCE = Tolerance(2e-2)
# Activations quantized to int8 in blocks move a logit by up to about a third of the spread; so may
# inputs that the graph itself rounds, where float16 and float32 fall to different sides.
INT8_ACTIVATIONS_TOLERANCE = Tolerance(0.5)
# Rounding sends a token that two experts want almost equally to the other one, and its answer with
# it. That is no fault of the engine; one that computes something else is wrong nearly everywhere.
ROUTING_OUTLIERS = 0.25


def tolerance_of(bundle: Bundle, options: EngineOptions) -> Tolerance:
    """What the numeric form of this engine explains."""
    quant = bundle.graph.quant
    # On a GPU integers are widened, not the activations rounded.
    on_processor = options.backend == "onnxruntime"
    rounded = on_processor and quant.kind in ("int4", "int8") and options.accuracy_level == 4
    if rounded or quant.activations != "none":
        tolerance = INT8_ACTIVATIONS_TOLERANCE
    elif bundle.graph.dtype == "float32":
        return FLOAT32_TOLERANCE
    else:
        tolerance = FLOAT16_TOLERANCE
    return tolerance if bundle.decoder.experts is None else _routed(tolerance)


def _routed(tolerance: Tolerance) -> Tolerance:
    return replace(tolerance, outliers=ROUTING_OUTLIERS)


def load_golden(bundle_dir: Path) -> Golden:
    """Raises ArtifactInvalid, DocumentInvalid."""
    path = bundle_dir / GOLDEN_JSON
    return loads(Golden, read_document(path), str(path))


def prove(engine: Engine, golden: Golden, tolerance: Tolerance, progress: Progress = ignore) -> int:
    """Answers every golden prompt that fits in row 0; how many tokens were checked.

    Raises EngineFault naming prompt and position, or when there is nothing to check.
    """
    checked = 0
    faults: list[EngineFault] = []
    for i, prompt in enumerate(golden.prompts):
        progress("answering golden prompts", i / len(golden.prompts))
        if len(prompt.tokens) > engine.limits.context:
            log.info("engine.golden_skipped", extra={"prompt": i, "tokens": len(prompt.tokens)})
            continue
        faults += _prove_prompt(engine, i, prompt, tolerance)
        checked += len(prompt.expected)
        if faults and not tolerance.outliers:
            raise faults[0]
    if len(faults) > tolerance.outliers * checked:
        raise faults[0]
    if not checked:
        raise EngineFault(
            "no golden prompt could be checked, so the engine is not proven; "
            "export the bundle again, or give the engine a larger context"
        )
    return checked


def _prove_prompt(
    engine: Engine, index: int, prompt: GoldenPrompt, tolerance: Tolerance
) -> list[EngineFault]:
    """What is too far from the recording, position by position: of one pass over the whole."""
    faults = []
    first = len(prompt.tokens) - len(prompt.expected)
    tokens = np.array(prompt.tokens, np.int64)
    for i, wanted in enumerate(prompt.expected):
        if i == 0:
            logits = engine.prefill(0, tokens[: first + 1], 0, length=len(tokens))
        else:
            step = RowStep(0, prompt.tokens[first + i], first + i, length=len(tokens))
            logits = engine.decode([step])[0]
        fault = _fault(index, first + i, wanted, prompt.logit[i], logits, tolerance)
        if fault is not None:
            faults.append(fault)
    return faults


def _fault(
    prompt: int,
    position: int,
    wanted: int,
    recorded: float,
    logits: NDArray[np.float32],
    tolerance: Tolerance,
) -> EngineFault | None:
    """The recorded token wins, or loses by no more than both logits may have moved; else why not.

    Raises EngineFault for what no numeric form explains.
    """
    where = f"golden prompt {prompt}, position {position}"
    if not 0 <= wanted < len(logits):
        raise EngineFault(f"{where}: expects token {wanted}, which the model has not")
    if not np.isfinite(logits).all():
        raise EngineFault(f"{where}: the engine's logits are not finite")
    allowed = tolerance.absolute(logits)
    best = int(logits.argmax())
    if logits[best] - logits[wanted] > 2 * allowed:
        return EngineFault(
            f"{where}: the engine answers token {best}, not {wanted}, by "
            f"{logits[best] - logits[wanted]:.4g}; {2 * allowed:.4g} is explained by its numeric "
            "form. Either the bundle's golden prompts are not its own (export it again) or this "
            "engine computes something else (remove it from the cache)"
        )
    if abs(float(logits[wanted]) - recorded) > allowed:
        return EngineFault(
            f"{where}: token {wanted} has logit {logits[wanted]:.5g}, recorded {recorded:.5g}, "
            f"further apart than {allowed:.4g}"
        )
    return None


def prove_mix(engine: Engine, golden: Golden, mix: Mix) -> None:
    """The engine answers finitely through a mix. Raises EngineFault."""
    fitting = [p for p in golden.prompts if len(p.tokens) <= engine.limits.context]
    if fitting and not np.isfinite(engine.prefill(0, np.array(fitting[0].tokens), 0, mix)).all():
        raise EngineFault("the engine's logits are not finite with this adapter")


def probe_in_child(
    entry: CacheEntry,
    bundle_dir: Path,
    adapter_dirs: Sequence[Path],
    options: EngineOptions,
    log_path: Path,
    limits: ChildLimits,
    progress: Progress = ignore,
    cancelled: Callable[[], bool] = never,
) -> int:
    """Loads engine and adapters in a child process and proves them; tokens checked. Blocking.

    Raises what `prove` and loading raise, and EngineFault when the child dies.
    """
    result = run_child(
        _CHILD,
        [
            canonical_json(OneRow.of(options)).decode(),
            str(entry.directory),
            str(bundle_dir),
            *map(str, adapter_dirs),
        ],
        what=f"the probe of the engine of {bundle_dir}",
        log_path=log_path,
        limits=limits,
        progress=progress,
        cancelled=cancelled,
    )
    return int(result["checked"])
