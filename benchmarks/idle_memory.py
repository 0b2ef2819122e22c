"""Memory of an idle `remora-agent serve` above what its engine alone takes in a bare process.

    python benchmarks/idle_memory.py [--http] [--work DIR]

The same tiny model in both, so that the difference is the agent: server, scheduler, text, metrics.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table
from soak import prepare, remora

GOAL_MB = 60.0
BARE = """
import sys, time
from pathlib import Path
from remora_agent.engine.cache import EngineCache
from remora_agent.engine.opening import EngineOptions, ensure_built, load_engine
from remora_contract.bundle import load_bundle
import numpy as np
bundle, options = Path(sys.argv[1]), EngineOptions(threads=1)
cache = EngineCache(Path(sys.argv[2]), 1 << 30)
built = ensure_built(bundle, cache, options, lambda *_: None, lambda: False, ())
engine = load_engine(built.entry, load_bundle(bundle), options)
engine.prefill(0, np.arange(5), 0)
print("ready", flush=True)
time.sleep(600)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--http", action="store_true", help="with the OpenAI surface on")
    parser.add_argument("--work", type=Path, help="where 100 MB of files may go for a while")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="idle-") as folder:
        bundle, _ = prepare(Path(folder))
        engines = str(Path(folder) / "engines")
        http = ("--openai-listen", "127.0.0.1:0") if arguments.http else ()
        serve = ("serve", bundle, "--listen", "127.0.0.1:0", "--threads", 1)
        agent = remora("agent", *serve, "--cache-dir", engines, *http)
        resident_mb([sys.executable, "-c", BARE, str(bundle), engines])  # builds the engine
        bare = resident_mb([sys.executable, "-c", BARE, str(bundle), engines])
        whole = resident_mb(agent)
    table = Table(title="resident MB, idle")
    for column in ("engine alone", "agent", "difference", "goal"):
        table.add_column(column, justify="right")
    verdict = "met" if whole - bare < GOAL_MB else "missed"
    table.add_row(f"{bare:.0f}", f"{whole:.0f}", f"{whole - bare:.0f}", f"< {GOAL_MB:g}: {verdict}")
    Console().print(table)


def resident_mb(command: list[str]) -> float:
    """Of the process once it has said its first line and rested a moment."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline()
            time.sleep(3)
            return psutil.Process(process.pid).memory_info().rss / 1e6
        finally:
            process.kill()


if __name__ == "__main__":
    main()
