"""`python -m remora_agent.engine.probe_child PIPE OPTIONS ENGINE_DIR BUNDLE_DIR [ADAPTER_DIR...]`.

Loads a built engine and proves it where a crash takes nothing down with it. One row: the old
engine still serves beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from remora_agent.bank.weights import load_weights
from remora_agent.engine.cache import read_entry
from remora_agent.engine.child_side import child_main
from remora_agent.engine.one_row import OneRow
from remora_agent.engine.opening import EngineOptions, load_engine
from remora_agent.engine.probe import load_golden, prove, prove_mix, tolerance_of
from remora_agent.engine.protocol import MixEntry
from remora_agent.host import Progress
from remora_contract.bundle import load_bundle
from remora_contract.strict import loads


def probe(
    options: EngineOptions,
    engine_dir: Path,
    bundle_dir: Path,
    adapter_dirs: Sequence[Path],
    progress: Progress,
) -> dict[str, Any]:
    """Raises what loading and proving raise."""
    progress("loading the engine", 0.0)
    bundle = load_bundle(bundle_dir)
    engine = load_engine(read_entry(engine_dir), bundle, options)
    golden = load_golden(bundle_dir)
    checked = prove(engine, golden, tolerance_of(bundle, options), progress)
    for directory in adapter_dirs:
        progress(f"trying adapter {directory.name}", 0.9)
        handle = engine.add_adapter(load_weights(directory, bundle))
        prove_mix(engine, golden, (MixEntry(handle, 1.0),))
        engine.remove_adapter(handle)
    return {"checked": checked}


def main() -> int:
    descriptor, settings, engine_dir, bundle_dir, *adapters = sys.argv[1:]
    options = loads(OneRow, settings, "the probe's options").options()
    return child_main(
        int(descriptor),
        lambda progress: probe(
            options, Path(engine_dir), Path(bundle_dir), [Path(a) for a in adapters], progress
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
