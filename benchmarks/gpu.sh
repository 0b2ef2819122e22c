#!/bin/sh
# Everything that needs an NVIDIA GPU, in one go; writes a report.
#
#   benchmarks/gpu.sh [REPORT]      (default: gpu-report.txt)
#
# For each TensorRT module that is installed: the conformance suite; the tests marked gpu (engine
# against the portable graph, adapter mixes, swaps during decode, CUDA-graph equality, memory after
# 10,000 steps), a short run of them under compute-sanitizer where that is installed; and the
# figures, a prompt beside decode steps on and off among them (benchmarks/gpu_numbers.py; SHAPES, by
# default 0.5B). A part that fails does not keep the others: the report ends with a line for each.
# PYTHON chooses the interpreter. Exit code 1: a part failed; 2: no GPU. REMORA_GPU_EMULATED=1 tries
# the script on the emulators, without a GPU.
set -u
cd "$(dirname "$0")/.." || exit 2
report=${1:-gpu-report.txt}
python=${PYTHON:-python3}
failed=0
summary=
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
    say "-- $title: $result"
    summary="$summary$title: $result; $(tail -n 1 "$log")
$(grep '^|' "$log" | sed 's/^/    /')
"
    rm -f "$log"
}

left_out() { # title, why
    say "" "== $1: not run, $2"
    summary="$summary$1: not run, $2
"
}

tests() { "$python" -m pytest -o addopts= -p no:cacheprovider -m gpu -rs -v -k "$@"; }

only() { # backend: one's name is the beginning of the other's
    if [ "$1" = tensorrt ]; then echo "tensorrt and not tensorrt_rtx"; else echo "$1"; fi
}

sanitized() {
    REMORA_GPU_STEPS=100 compute-sanitizer --error-exitcode 9 --target-processes all \
        "$python" -m pytest -o addopts= -m "gpu and not slow" -v tests/agent/engine/test_gpu.py \
        -k "$(only "$1") and (different or beside or copied)"
}

: >"$report"
say "Remora on a GPU, $(date -u +%Y-%m-%dT%H:%M:%SZ), commit $(git rev-parse --short HEAD 2>/dev/null)"
found=$(mktemp)
trap 'rm -f "$found"' EXIT
if ! "$python" - "$found" >>"$report" 2>&1 <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version

from remora_agent.engine.trt.module import TRT_BACKENDS
from remora_contract.errors import RemoraError
from tests.support import gpu

for name in ("cuda-bindings", "tensorrt", "tensorrt-rtx", "onnxruntime"):
    try:
        print(name, version(name))
    except PackageNotFoundError:
        print(name, "is not installed")
if gpu.EMULATED:
    print("EMULATED: this shows that the script runs, and nothing about a GPU")
missing, found = [], []
for backend in TRT_BACKENDS:
    try:
        cuda = gpu.gpu(backend)
    except RemoraError as e:
        missing.append(f"{backend}: {e}")
        continue
    found.append(backend)
    print(backend, "runs; bytes free and in all:", *cuda.free_memory())
print(*missing, sep="\n")
if not found:
    raise SystemExit("nothing was run")
with open(sys.argv[1], "w") as file:
    print(*found, file=file)
PYTHON
then
    cat "$report"
    exit 2
fi
command -v nvidia-smi >/dev/null && nvidia-smi >>"$report" 2>&1

for backend in $(cat "$found"); do
    part "$backend: conformance" tests "$(only "$backend")" tests/agent/engine/test_conformance_*.py
    part "$backend: tests on the GPU" tests "$(only "$backend")" tests/agent/engine/test_gpu.py
    part "$backend: against transformers and PEFT" tests "$(only "$backend")" \
        tests/agent/engine/test_gpu_transformers.py
    if ! command -v compute-sanitizer >/dev/null; then
        left_out "$backend: compute-sanitizer" "it is not installed"
    else
        part "$backend: a short run under compute-sanitizer" sanitized "$backend"
    fi
    # shellcheck disable=SC2086
    part "$backend: figures" "$python" benchmarks/gpu_numbers.py --backend "$backend" \
        --shape ${SHAPES:-0.5B}
done
say "" "== Summary" "$summary" "Report: $report"
exit "$failed"
