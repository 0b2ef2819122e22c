"""What people's requests cost with a shadow of 100 % and without one, in blocks by turns.

    python benchmarks/shadow.py [--rounds N] [--requests N] [--work DIR]

A small random model on ONNX Runtime, one thread, two rows; the server is a process of its own and
switches between two releases, which differ in the shadow alone. Two loads: callers without a pause,
so that the device is busy, and one who pauses, shortly or so long that shadows begin and are ended.
Ratios are of medians over all requests of all blocks; the second release is of no shadow again.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from export import QWEN_05B, SHAPES, make_checkpoint
from peft_adapter import make_adapter
from rich.console import Console
from rich.table import Table

from remora_agent.client import Client
from remora_agent.engine.opening import EngineOptions
from remora_agent.host import AssignedAdapter, Assignment
from remora_agent.hosting.engines import CachedEngines, EngineSettings
from remora_agent.serving.address import TcpAddress
from remora_agent.serving.stack import ServingStack, StackOptions
from remora_contract.adapter import load_adapter
from remora_contract.bundle import load_bundle
from remora_contract.experiments import Arm, Experiment, Shadow

SMALL = {
    **QWEN_05B,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
    "max_position_embeddings": 1024,
}
SHAPE = replace(SHAPES["0.5b"], title="small", config=SMALL)
ARMS = (Arm("i", 100, adapter="a"), Arm("c", 0, adapter="b"))
EXPERIMENTS = {
    "off": Experiment("x", ARMS),
    "on": Experiment("x", ARMS, shadow=Shadow("i", "c", 100)),
    "off again": Experiment("x", ARMS),
}
LOADS = {
    "4 callers, no pause": (4, 0.0),
    "1 caller, pauses of 30 ms": (1, 0.03),
    "1 caller, pauses of 300 to 500 ms": (1, 0.3),
}
JITTER_S = 0.2  # of pauses in which a shadow may begin, so that its steps are met anywhere
TOKENS = 24
BEGINNING = "The same instructions stand before every question, and are kept. " * 2

Times = dict[str, list[float]]  # first token and whole answer, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=8, help="blocks of each release (default: 8)")
    parser.add_argument("--requests", type=int, default=60, help="of a block (default: 60)")
    parser.add_argument("--work", type=Path, help="where 100 MB of files may go for a while")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="shadow-") as folder:
        prepare(Path(folder))
        command = [sys.executable, __file__, "--serve", folder]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as server:
            measure(server, arguments.rounds, arguments.requests)


def prepare(work: Path) -> None:
    make_checkpoint(work / "checkpoint", SHAPE)
    bundle = work / "bundle"
    build("export", work / "checkpoint", bundle)
    make_adapter(work / "peft", SHAPE)
    for name, alpha in (("a", 32), ("b", 24)):
        config = work / "peft" / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": alpha}))
        build("adapter", work / "peft", work / name, "--base", bundle)


def build(*words: object) -> None:
    code = "from remora_build.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def serve(work: Path) -> None:
    """Each line that comes names the release to switch to; what comes back are the counts."""
    settings = EngineSettings(cache_dir=work / "engines", options=EngineOptions(rows=2, threads=1))
    options = StackOptions(TcpAddress("127.0.0.1", 0), engines=settings)
    stack = ServingStack(options, engines=CachedEngines(settings))
    address = stack.start().target()
    bundle = work / "bundle"
    adapters = tuple(
        AssignedAdapter(n, "r1", load_adapter(work / n).digest, work / n) for n in "ab"
    )
    plain = Assignment("plain", load_bundle(bundle).digest, bundle, adapters)
    stack.host.build(plain, lambda phase, done: None)
    tell({"address": address})
    for line in sys.stdin:
        name = json.loads(line)
        metrics = {n.split(".")[0]: v for n, v in stack.host.metrics().items() if "/c/" in n}
        release = replace(plain, release_id=name, experiments=(EXPERIMENTS[name],))
        stack.host.switch(release)
        tell(metrics)
    stack.stop(5.0)


def tell(what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def ask(server: subprocess.Popen[str], what: str | None = None) -> dict[str, Any]:
    assert server.stdin is not None and server.stdout is not None
    if what is not None:
        server.stdin.write(json.dumps(what) + "\n")
        server.stdin.flush()
    for line in server.stdout:
        if line.startswith("{"):
            return dict(json.loads(line))
    raise SystemExit("the server ended early")


def measure(server: subprocess.Popen[str], rounds: int, requests: int) -> None:
    address = ask(server)["address"]
    ask(server, "off")
    for title, (callers, pause_s) in LOADS.items():
        times: dict[str, Times] = {name: defaultdict(list) for name in EXPERIMENTS}
        counts: dict[str, float] = {}
        block(address, callers, pause_s, requests, defaultdict(list))  # does not count
        for _ in range(rounds):
            for name in EXPERIMENTS:
                ask(server, name)
                block(address, callers, pause_s, requests, times[name])
                time.sleep(0.2)
                if name == "on":  # the next switch tells what it counted
                    counts = ask(server, "on")
        Console().print(report(title, times, counts))
    assert server.stdin is not None
    server.stdin.close()
    server.wait(60)


def block(address: str, callers: int, pause_s: float, requests: int, times: Times) -> None:
    def call(number: int) -> None:
        chance = random.Random(number)
        with Client(address, timeout_s=120) as client:
            for _ in range(requests // callers):
                first_s, whole_s = one(client, chance)
                times["first token"].append(first_s)
                times["whole answer"].append(whole_s)
                time.sleep(pause_s + (chance.random() * JITTER_S if pause_s > JITTER_S else 0.0))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def one(client: Client, chance: random.Random) -> tuple[float, float]:
    began = time.perf_counter()
    prompt = f"{BEGINNING}{chance.random()}"
    stream = client.stream(prompt, adapter="x", max_tokens=TOKENS, ignore_eos=True, temperature=0.0)
    deltas = iter(stream)
    next(deltas)
    first_s = time.perf_counter() - began
    for _ in deltas:
        pass
    return first_s, time.perf_counter() - began


def report(title: str, times: dict[str, Times], counts: dict[str, float]) -> Table:
    told = {n.removeprefix("shadow_"): v for n, v in counts.items() if n.startswith("shadow_")}
    ends = ("offered", "compared", "skipped", "cancelled", "failed")
    table = Table(
        title=title, caption=", ".join(f"{told[n]:.0f} {n}" for n in ends) + " (all blocks of on)"
    )
    for column in ("what", *EXPERIMENTS, "on / off", "off again / off"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for what in ("first token", "whole answer"):
        for part, share in (("median", 0.5), ("95 %", 0.95)):
            found = [quantile(times[name][what], share) for name in EXPERIMENTS]
            ratios = [found[1] / found[0], found[2] / found[0]]
            shown = [f"{s * 1000:.1f} ms" for s in found] + [f"{r:.3f}" for r in ratios]
            table.add_row(f"{what}, {part}", *shown)
    return table


def quantile(values: list[float], share: float) -> float:
    if share == 0.5:
        return statistics.median(values)
    return sorted(values)[int(share * len(values))]


if __name__ == "__main__":
    main()
