"""python -m remora_agent.engine.ort.native.build: makes the operator's library beside its source.

Also run, as a file, by the package's own build (hatch_build.py), so it imports nothing of ours.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = HERE / "low_rank_add.c"
LIBRARY = HERE / "low_rank_add.so"
# -fno-math-errno and the like are not needed; a product and a sum may be one instruction.
FLAGS = ("-std=c11", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-fvisibility=hidden")
_LIMIT_S = 300


class NotBuilt(Exception):
    """There is no compiler, or it refuses the source."""


def build(library: Path = LIBRARY) -> Path:
    """Compiles for the processor's family, not this one processor. Raises NotBuilt."""
    # A compiler of another machine's name, as some Pythons were built with, may not be here.
    named = os.environ.get("CC")
    compilers = [named] if named else ["cc", "gcc", "clang", sysconfig.get_config_var("CC") or ""]
    made = library.with_name(f"{library.name}.{os.getpid()}")
    problems = []
    for compiler in filter(None, compilers):
        command = [*shlex.split(compiler), *FLAGS, "-o", str(made), str(SOURCE)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_LIMIT_S)
        except FileNotFoundError:
            problems.append(f"{compiler} is not installed")
        except subprocess.CalledProcessError as e:
            problems.append(f"{compiler}: {e.stderr.strip()[-300:]}")
        except (OSError, subprocess.TimeoutExpired) as e:
            problems.append(f"{compiler}: {e}")
        else:
            made.replace(library)
            return library
    made.unlink(missing_ok=True)
    raise NotBuilt("; ".join(problems))


def main() -> int:
    try:
        sys.stdout.write(f"{build()}\n")
    except NotBuilt as e:
        sys.stderr.write(f"the library was not built: {e}. Install gcc or clang, or set CC\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
