#!/bin/sh
# Everything that needs an NVIDIA GPU, in one go; writes a report.
#
#   benchmarks/gpu.sh [REPORT]      (default: gpu-report.txt)
#
# Runs the tests marked gpu (engine against the portable graph, adapter mixes, swaps during decode,
# CUDA-graph equality, memory after 10,000 steps) and a short run of them under compute-sanitizer
# where that is installed. PYTHON chooses the interpreter. Exit code 1: a part failed; 2: no GPU.
set -u
cd "$(dirname "$0")/.." || exit 2
report=${1:-gpu-report.txt}
python=${PYTHON:-python3}
failed=0
export PYTHONPATH="protos:buildhost:controller:agent:.${PYTHONPATH:+:$PYTHONPATH}"

say() { printf '%s\n' "$@" | tee -a "$report"; }

part() { # title, command...
    title=$1
    shift
    say "" "== $title"
    log=$(mktemp)
    if "$@" >"$log" 2>&1; then
        result=passed
    else
        result="FAILED (exit code $?)"
        failed=1
    fi
    cat "$log" >>"$report"
    rm -f "$log"
    say "-- $title: $result"
}

tests() { "$python" -m pytest -o addopts= -m gpu -rs -v "$@" tests/agent/engine/test_gpu.py; }

sanitized() {
    REMORA_GPU_STEPS=100 compute-sanitizer --error-exitcode 9 --target-processes all \
        "$python" -m pytest -o addopts= -m "gpu and not slow" -v tests/agent/engine/test_gpu.py \
        -k "different or beside or copied"
}

: >"$report"
say "Remora on a GPU, $(date -u +%Y-%m-%dT%H:%M:%SZ), commit $(git rev-parse --short HEAD 2>/dev/null)"
if ! "$python" - >>"$report" 2>&1 <<'PYTHON'
from importlib.metadata import PackageNotFoundError, version

from remora_agent.engine.trt.cuda import Cuda, load_bindings
from remora_agent.engine.trt.module import TRT_BACKENDS, load_module
from remora_contract.errors import RemoraError

for name in ("cuda-bindings", "tensorrt", "tensorrt-rtx", "onnxruntime"):
    try:
        print(name, version(name))
    except PackageNotFoundError:
        print(name, "is not installed")
missing = []
for backend in TRT_BACKENDS:
    try:
        load_module(backend)
    except RemoraError as e:
        missing.append(str(e))
if len(missing) == len(TRT_BACKENDS):
    raise SystemExit("nothing was run: " + "; ".join(missing))
try:
    cuda = Cuda(load_bindings())
    cuda.open_device()
    print("bytes free and in all:", *cuda.free_memory())
except RemoraError as e:
    raise SystemExit(f"nothing was run: {e}") from e
PYTHON
then
    cat "$report"
    exit 2
fi
command -v nvidia-smi >/dev/null && nvidia-smi >>"$report" 2>&1

part "tests marked gpu" tests
if command -v compute-sanitizer >/dev/null; then
    part "a short run under compute-sanitizer" sanitized
else
    say "" "== compute-sanitizer is not installed: not run"
fi
say "" "Report: $report"
exit "$failed"
