"""python llama_worker.py LLAMA_BENCH MODEL_GGUF THREADS: llama.cpp, driven line by line through its
own llama-bench. Imports nothing of Remora.

Requests: {"what": "prefill", "tokens", "repeats"} and {"what": "decode", "past", "steps"}. Each
starts llama-bench once; it times the work itself, after loading and a run that does not count. Of a
decode block it tells one time, so every step is said to take the block's mean.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def main() -> None:
    program, model, threads = sys.argv[1:]
    base = [program, "-m", model, "-t", threads, "-o", "json", "-ngl", "0"]
    say({"ready": True, "build": run([*base, "-p", "8", "-n", "0", "-r", "1"])["build_commit"]})
    for line in sys.stdin:
        request = json.loads(line)
        if request["what"] == "prefill":
            work = ["-p", str(request["tokens"]), "-n", "0", "-r", str(request["repeats"])]
            steps = 1
        else:
            steps = request["steps"]
            work = ["-p", "0", "-n", str(steps), "-d", str(request["past"]), "-r", "1"]
        nanoseconds = run([*base, *work])["samples_ns"]
        say({"seconds": [ns / 1e9 / steps for ns in nanoseconds for _ in range(steps)]})


def say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def run(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    (only,) = json.loads(done.stdout)
    return dict(only)


if __name__ == "__main__":
    main()
