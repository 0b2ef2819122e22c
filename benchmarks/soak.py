"""A real `remora-agent serve` under mixed load for a while: what fails, what grows, what is left.

    python benchmarks/soak.py [--minutes N] [--callers N] [--work DIR]

A tiny random model on ONNX Runtime, two adapters and a use case. Callers ask at random for answers
of the base and of adapters, long prompts, JSON and choices, log probabilities, several answers and
embeddings, give up some and leave others in the middle. Resident memory, descriptors and threads of
the server are looked at from outside. The limit is physical: nothing may be left or grow, but for
the prefix cache up to its bound.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
from export import QWEN_05B, SHAPES, make_checkpoint
from peft_adapter import make_adapter
from rich.console import Console
from rich.table import Table

from remora_agent.client import AsyncClient
from remora_contract.errors import Cancelled, DeadlineExceeded, RemoraError

TINY = {
    **QWEN_05B,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "max_position_embeddings": 1024,
}
SHAPE = replace(SHAPES["0.5b"], title="tiny", config=TINY)
SCHEMA = '{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}'
LOOK_S = 5.0
METRICS = "127.0.0.1:7459"


@dataclass
class Seen:
    kinds: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    first_s: list[float] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--callers", type=int, default=12)
    parser.add_argument("--work", type=Path, help="where 100 MB of files may go for a while")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="soak-") as folder:
        bundle, adapters = prepare(Path(folder))
        with subprocess.Popen(
            [
                *remora("agent", "serve", bundle, "--listen", "127.0.0.1:0", "--threads", 1),
                *("--cache-dir", str(Path(folder) / "engines"), "--metrics-listen", METRICS),
                *(f"--adapter={name}={path}" for name, path in adapters.items()),
                "--use-case=both=a:0.5,b:0.25",
            ],
            stdout=subprocess.PIPE,
            text=True,
        ) as server:
            try:
                line = server.stdout.readline() if server.stdout else ""
                address = line.rsplit(" on ", 1)[1].strip()
                seen = Seen()
                asyncio.run(load(address, server.pid, arguments, seen))
                Console().print(report(seen, left(), arguments.minutes))
            finally:
                server.terminate()
                server.wait(60)


def remora(part: str, *words: object) -> list[str]:
    module = {"build": "remora_build", "agent": "remora_agent"}[part]
    code = f"from {module}.cli import main; main()"
    return [sys.executable, "-c", code, *map(str, words)]


def prepare(work: Path) -> tuple[Path, dict[str, Path]]:
    make_checkpoint(work / "checkpoint", SHAPE)
    bundle = work / "bundle"
    subprocess.run(remora("build", "export", work / "checkpoint", bundle), check=True)
    make_adapter(work / "peft", SHAPE)
    adapter = work / "adapter"
    words = ("adapter", work / "peft", adapter, "--base", bundle)
    subprocess.run(remora("build", *words), check=True, stdout=subprocess.DEVNULL)
    # Both names stand for the same bytes, which the bank keeps once; their weights differ.
    return bundle, {"a": adapter, "b": adapter}


async def load(address: str, pid: int, arguments: argparse.Namespace, seen: Seen) -> None:
    end = time.monotonic() + 60 * arguments.minutes
    async with AsyncClient(address, timeout_s=120) as client:
        looking = asyncio.ensure_future(look(pid, seen))
        await asyncio.gather(
            *(call(client, random.Random(i), end, seen) for i in range(arguments.callers))
        )
        looking.cancel()


async def look(pid: int, seen: Seen) -> None:
    server = psutil.Process(pid)
    while True:
        seen.rss.append(server.memory_info().rss)
        seen.descriptors.append(server.num_fds())
        seen.threads.append(server.num_threads())
        await asyncio.sleep(LOOK_S)


async def call(client: AsyncClient, chance: random.Random, end: float, seen: Seen) -> None:
    while time.monotonic() < end:
        kind = chance.choice(list(KINDS))
        try:
            await KINDS[kind](client, chance, seen)
            seen.kinds[kind] += 1
        except RemoraError as e:
            seen.failures[f"{kind}: {type(e).__name__}: {str(e)[:80]}"] += 1


def prompt_of(chance: random.Random, most: int = 80) -> str:
    return f"{chance.random()} " + "word " * chance.randrange(1, most // 4)


async def plain(client: AsyncClient, chance: random.Random, seen: Seen) -> None:
    adapter = chance.choice([None, "a", "b", {"a": 0.5, "b": 0.5}])
    sampling = chance.choice([{}, {"temperature": 0.9, "top_p": 0.9, "seed": 7}])
    result = await client.generate(
        prompt_of(chance), adapter=adapter, max_tokens=chance.randrange(1, 40), **sampling
    )
    seen.first_s.append(result.timings.time_to_first_token_s)


async def long(client: AsyncClient, chance: random.Random, seen: Seen) -> None:
    await client.generate(prompt_of(chance, 600), use_case="both", max_tokens=8)


async def given_up(client: AsyncClient, chance: random.Random, seen: Seen) -> None:
    stream = await client.stream(prompt_of(chance), adapter="a", max_tokens=300, ignore_eos=True)
    try:
        async for _ in stream:
            if chance.random() < 0.3:
                stream.cancel()
    except Cancelled:
        return


async def constrained(client: AsyncClient, chance: random.Random, seen: Seen) -> None:
    limits = chance.choice(
        [{"json_schema": SCHEMA}, {"choice": ["yes", "no"]}, {"regex": "[a-z]{3,9}"}]
    )
    await client.generate(prompt_of(chance), adapter="b", max_tokens=60, **limits)


async def scored(client: AsyncClient, chance: random.Random, seen: Seen) -> None:
    await client.generate(prompt_of(chance), max_tokens=8, logprobs=5, n=3, temperature=0.5)


async def embedded(client: AsyncClient, chance: random.Random, seen: Seen) -> None:
    await client.embed([prompt_of(chance) for _ in range(4)])


async def late(client: AsyncClient, chance: random.Random, seen: Seen) -> None:
    try:
        async with asyncio.timeout(chance.random() * 0.2):
            await client.generate(prompt_of(chance), max_tokens=200, ignore_eos=True)
    except (TimeoutError, DeadlineExceeded):
        return


KINDS = {
    "answers": plain,
    "long prompts": long,
    "given up": given_up,
    "constrained": constrained,
    "scored, three answers": scored,
    "embedded": embedded,
    "left in the middle": late,
}


def left() -> dict[str, float]:
    """What the server's metrics say is still held, once nobody asks any more."""
    time.sleep(2)
    with urllib.request.urlopen(f"http://{METRICS}/metrics") as page:
        text = page.read().decode()
    names = ("rows_busy", "queue_depth", "adapter_leases", "requests_failed_total")
    found = {name: re.search(rf"^remora_{name} (\S+)$", text, re.M) for name in names}
    return {name: float(m[1]) if m else float("nan") for name, m in found.items()}


def report(seen: Seen, held: dict[str, float], minutes: float) -> Table:
    table = Table(title=f"{minutes:g} minutes of mixed load")
    table.add_column("what")
    table.add_column("figure", justify="right")
    for kind, count in seen.kinds.items():
        table.add_row(kind, str(count))
    for failure, count in seen.failures.items():
        table.add_row(f"FAILED {failure}", str(count))
    firsts = sorted(seen.first_s)
    table.add_row("first token, median s", f"{statistics.median(firsts):.3f}")
    table.add_row("first token, 95 % s", f"{firsts[int(0.95 * len(firsts))]:.3f}")
    for title, series, unit in (
        ("resident MB after 10 %, 50 %, at the end", seen.rss, 1e6),
        ("descriptors", seen.descriptors, 1),
        ("threads", seen.threads, 1),
    ):
        points = [series[len(series) // 10], series[len(series) // 2], series[-1]]
        table.add_row(title, ", ".join(f"{p / unit:.0f}" for p in points))
    for name, value in held.items():
        table.add_row(name, f"{value:g}")
    return table


if __name__ == "__main__":
    main()
