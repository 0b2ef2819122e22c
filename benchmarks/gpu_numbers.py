"""The figures of a TensorRT engine on this machine's GPU, each beside its goal.

    python benchmarks/gpu_numbers.py --backend tensorrt_rtx [--shape 0.5B] [--form float16 int4]

Weights are random: speed does not depend on them. The bandwidth is what a copy on the device
reaches here. Transformers runs the same shape with PEFT's adapter in float16 on a static cache,
plainly and with torch.compile, where torch sees the GPU. With REMORA_GPU_EMULATED=1 a tiny shape
runs on the emulators, to try this script: its figures mean nothing and no goal is held against
them. A line that fails or cannot be measured does not keep the others. Exit code 1: a line failed
or missed its goal.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu_peers import transformers_rates

from remora_agent.engine.protocol import Engine, Mix, MixEntry, RowStep, Watch
from remora_agent.engine.trt import files
from remora_agent.engine.trt.inspector import engine_layers
from remora_agent.engine.trt.module import TRT_BACKENDS, load_module
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import RemoraError
from tests.agent.engine.portable import (
    FLOAT16,
    FLOAT32,
    INT4,
    LLAMA,
    QWEN2,
    random_adapter,
    random_bundle,
)
from tests.support import gpu

SHAPES = {
    "tiny": QWEN2,
    "0.5B": replace(
        QWEN2,
        layers=24,
        hidden=896,
        heads=14,
        kv_heads=2,
        head_dim=64,
        intermediate=4864,
        vocab=151_936,
    ),
    "8B": replace(
        LLAMA,
        layers=32,
        hidden=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        intermediate=14_336,
        vocab=128_256,
    ),
}
FORMS = {"float16": FLOAT16, "int4": replace(INT4, dtype="float16")}
ROWS, CONTEXT, RANK = 8, 1024, 16
PAST = 128
STEPS = 4 if gpu.EMULATED else 200
READ, PIECE = (12, 4) if gpu.EMULATED else (512, 128)  # tokens of a prompt beside decode steps
SWAPS = 3 if gpu.EMULATED else 50
COPIED = 1 << (20 if gpu.EMULATED else 28)  # bytes of a copy by which the bandwidth is measured


class NotMeasured(Exception):
    """Why."""


@dataclass(frozen=True)
class Figure:
    text: str
    met: bool | None = None  # None: there is no goal


class Rig:
    """One engine and what is asked of it."""

    def __init__(self, backend: str, spec: DecoderSpec, form: str, work: Path) -> None:
        graph = FLOAT32 if gpu.EMULATED else FORMS[form]
        self.backend, self.spec = backend, spec
        graph = replace(graph, context=48 if gpu.EMULATED else CONTEXT, max_bank_rank=4 * RANK)
        self.past = 8 if gpu.EMULATED else PAST
        directory = random_bundle(work / "bundle", spec, graph)
        self.made = gpu.engines(backend, directory, work, ROWS)
        self.engine: Engine = self.made.open(rows=ROWS)
        self.adapters = [random_adapter(spec, s, RANK) for s in (1, 2)]

    def start(self, rows: int, mix: Mix = ()) -> None:
        tokens = np.arange(1, self.past + 1, dtype=np.int64)
        for row in range(rows):
            self.engine.prefill(row, tokens, 0, mix)

    def seconds(self, rows: int, mixes: tuple[Mix, ...] = ((),)) -> float:
        """Median of warm steps, mixes taking turns; greedy from shortlists, as served."""
        self.start(rows, mixes[0])
        watches, times = [Watch(np.empty(0, np.int64))] * rows, []
        for i in range(STEPS + 2):
            mix = mixes[i % len(mixes)]
            steps = [RowStep(row, 7, self.past, mix) for row in range(rows)]
            begun = time.perf_counter()
            self.engine.decode_shortlist(steps, watches)
            times.append(time.perf_counter() - begun)
        return statistics.median(times[2:])

    @property
    def weights(self) -> int:
        entry = self.made.entry
        fact = entry.manifest.facts.get(files.FACT_WEIGHTS)
        return int(fact) if fact else (entry.directory / files.PLAN).stat().st_size


def bandwidth(rig: Rig) -> float:
    """Bytes a second, read and written, of a copy on the device."""
    cuda = rig.made.cuda
    stream = cuda.make_stream()
    places = [cuda.allocate(COPIED, "a copy to measure the bandwidth") for _ in range(2)]
    times = []
    try:
        for _ in range(5):
            begun = time.perf_counter()
            cuda.copy(places[0], places[1], COPIED, "on_device", stream)
            cuda.synchronize(stream)
            times.append(time.perf_counter() - begun)
    finally:
        for place in places:
            cuda.free(place)
        cuda.destroy_stream(stream)
    return 2 * COPIED / min(times)


def decode_share(rig: Rig) -> Figure:
    step, most = rig.seconds(1), bandwidth(rig)
    share = rig.weights / step / most
    text = (
        f"{1 / step:.1f} tok/s; {share:.0%} of {most / 1e9:.0f} GB/s, weights {rig.weights} bytes"
    )
    return Figure(text, share >= 0.7)


def batch(rig: Rig) -> Figure:
    one, eight = rig.seconds(1), rig.seconds(ROWS)
    ratio = ROWS * one / eight
    return Figure(f"{ratio:.2f} times batch 1 ({ROWS / eight:.1f} tok/s)", ratio >= 6)


def adapter(rig: Rig) -> Figure:
    mix = (MixEntry(rig.engine.add_adapter(rig.adapters[0]), 1.0),)
    more = rig.seconds(1, (mix,)) / rig.seconds(1) - 1
    rig.engine.remove_adapter(mix[0].handle)
    return Figure(f"{more:+.1%} a step", more <= 0.05)


def resident_swap(rig: Rig) -> Figure:
    handles = [rig.engine.add_adapter(a) for a in rig.adapters]
    one, two = (((MixEntry(h, 1.0),)) for h in handles)
    more = rig.seconds(1, (one, two)) - rig.seconds(1, (one,))
    for handle in handles:
        rig.engine.remove_adapter(handle)
    return Figure(f"{1e3 * more:+.3f} ms a step", more <= 1e-4)


def loaded_swap(rig: Rig) -> Figure:
    ready, times = [rig.engine.prepare(a) for a in rig.adapters], []
    handle = rig.engine.add_adapter(ready[0])
    rig.start(1)
    for i in range(SWAPS):
        begun = time.perf_counter()
        rig.engine.remove_adapter(handle)
        handle = rig.engine.add_adapter(ready[i % 2])
        rig.engine.decode([RowStep(0, 7, rig.past, (MixEntry(handle, 1.0),))])
        times.append(time.perf_counter() - begun)
    rig.engine.remove_adapter(handle)
    p95 = float(np.percentile(times, 95)) - rig.seconds(1)
    return Figure(f"p95 {1e3 * p95:.2f} ms beside the step", p95 <= 0.01)


def host_share(rig: Rig) -> Figure:
    """A step's time less that of replaying its graph, many in a row before one wait."""
    step = rig.seconds(1)
    device: Any = rig.engine
    device = device._device
    (shape,) = [s for s in device._graphs._captured if s.rows == 1 and not any(s.bound)]
    begun = time.perf_counter()
    for _ in range(STEPS):
        device._graphs.run(shape)
    device.finish()
    replayed = (time.perf_counter() - begun) / STEPS
    return Figure(f"{1e3 * (step - replayed):.3f} ms a step", step - replayed <= 3e-4)


def overlap(rig: Rig) -> Figure:
    """A prompt in pieces while seven rows decode: in turns with their steps, as where overlap is
    off, and beside them."""
    if not rig.engine.limits.overlaps:
        raise NotMeasured("no memory for a second execution context")
    turns, beside = (_read_among_steps(rig, is_beside=b) for b in (False, True))
    text = "; ".join(
        f"{name} {1e3 * seconds:.1f} ms, {count} steps meanwhile, longest wait {1e3 * pause:.1f} ms"
        for name, (seconds, count, pause) in (("off", turns), ("on", beside))
    )
    return Figure(f"{READ} tokens: {text}")


def _read_among_steps(rig: Rig, *, is_beside: bool) -> tuple[float, int, float]:
    """Of the second time, when all shapes are warm: seconds until the prompt is read, decode steps
    meanwhile, and the longest time between two of them."""
    engine, row = rig.engine, ROWS - 1
    tokens = np.arange(1, READ + 1, dtype=np.int64)
    steps = [RowStep(r, 7, rig.past) for r in range(row)]
    rig.start(row)
    for _ in range(2):
        ended = [time.perf_counter()]
        for at in range(0, READ, PIECE):
            piece = tokens[at : at + PIECE]
            if is_beside:
                engine.begin_prefill(row, piece, at)
            else:
                engine.prefill(row, piece, at)
            while True:
                engine.decode(steps)
                ended.append(time.perf_counter())
                if not is_beside or engine.prefill_ready():
                    break
            if is_beside:
                engine.end_prefill()
    return time.perf_counter() - ended[0], len(ended) - 1, max(np.diff(ended))


def energy(rig: Rig) -> Figure:
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        before = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        rig.seconds(1)
        spent = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before
    except ImportError as e:
        raise NotMeasured("pip install 'remora[nvml]'") from e
    except pynvml.NVMLError as e:
        raise NotMeasured(f"NVML: {e}") from e
    return Figure(f"{spent / 1e3 / (STEPS + 2):.3f} J a token, one prompt of {rig.past} in it")


def against_transformers(rig: Rig) -> Figure:
    """Both with an adapter."""
    mix = (MixEntry(rig.engine.add_adapter(rig.adapters[0]), 1.0),)
    own = 1 / rig.seconds(1, (mix,))
    rig.engine.remove_adapter(mix[0].handle)
    try:
        rates = transformers_rates(rig.spec, RANK, rig.past, STEPS, on_cpu=gpu.EMULATED)
    except ImportError as e:
        raise NotMeasured(f"{e}; pip install torch transformers peft") from e
    if not rates:
        raise NotMeasured("torch sees no GPU")
    return Figure("; ".join(f"{own / r:.2f} times {name} ({r:.1f} tok/s)" for name, r in rates))


def layers(rig: Rig) -> Figure:
    """After fusion, as TensorRT's inspector names them."""
    if gpu.EMULATED:
        raise NotMeasured("the emulator has no layers")
    named: Any = rig.backend
    trt: Any = load_module(named).trt
    found = engine_layers(trt, (rig.made.entry.directory / files.PLAN).read_bytes())
    names = [str(n["Name"] if isinstance(n, dict) else n) for n in found]
    fused = sum("mha" in n.lower() or "attention" in n.lower() for n in names)
    return Figure(f"{len(names)}, {fused} of them attention; first: {', '.join(names[:3])}")


LINES: tuple[tuple[str, str, Callable[[Rig], Figure]], ...] = (
    ("decode, batch 1", ">= 70 % of the bandwidth", decode_share),
    ("decode, batch 8", ">= 6 times batch 1", batch),
    ("adapter of rank 16", "<= 5 %", adapter),
    ("swap of resident adapters", "0 ms", resident_swap),
    ("swap from host to bank", "p95 <= 10 ms", loaded_swap),
    ("step, the host's part", "<= 0.3 ms", host_share),
    ("a prompt beside decode steps", "", overlap),
    ("energy per token", "", energy),
    ("against transformers + peft", "", against_transformers),
    ("layers after fusion", "", layers),
)


def line(rig: Rig, name: str, goal: str, measure: Callable[[Rig], Figure]) -> tuple[str, bool]:
    """The report's line and whether it is as it should be."""
    try:
        figure = measure(rig)
    except NotMeasured as e:
        return f"| {name} | {goal} | not measured: {e} | |", True
    except Exception as e:  # noqa: BLE001  the next lines are worth having
        return f"| {name} | {goal} | {type(e).__name__}: {e} | FAILED |", False
    if figure.met is None or gpu.EMULATED:
        return f"| {name} | {goal} | {figure.text} | |", True
    return f"| {name} | {goal} | {figure.text} | {'met' if figure.met else 'MISSED'} |", figure.met


def report(backend: str, shape: str, form: str) -> bool:
    """Whether every line is as it should be."""
    good = True
    with tempfile.TemporaryDirectory(prefix="gpu-numbers-") as work:
        try:
            rig = Rig(backend, SHAPES[shape], form, Path(work))
        except RemoraError as e:  # the other forms are worth having
            print(f"FAILED: no engine: {e}", flush=True)
            return False
        for name, goal, measure in LINES:
            text, fine = line(rig, name, goal, measure)
            print(text, flush=True)
            good &= fine
        rig.engine.close()
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", choices=TRT_BACKENDS, required=True)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["0.5B"])
    parser.add_argument("--form", nargs="+", choices=FORMS, default=list(FORMS))
    arguments = parser.parse_args()
    if gpu.EMULATED:
        arguments.shape, arguments.form = ["tiny"], ["float16"]
        print("emulated: the figures mean nothing")
    good = True
    for shape, form in product(arguments.shape, arguments.form):
        print(f"{arguments.backend}, {shape}, {form}")
        good &= report(arguments.backend, shape, form)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
