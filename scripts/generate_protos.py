"""Generates remora_protos from the .proto files; `--check` fails when committed code differs.

The code is made with the oldest supported tools, in a virtual environment of their own, because
generated code runs under newer protobuf runtimes but never under older ones: a fleet's
applications bring their own protobuf (tritonclient wants < 7). The KServe messages go to a
descriptor pool of their own: their clients register the same names.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
TOOLS = ["grpcio-tools==1.62.3", "protobuf==4.25.3", "setuptools<81"]
GENERATED = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")
OWN_POOL = Path("remora_protos/kserve")
_DEFAULT_POOL = "from google.protobuf import descriptor_pool as _descriptor_pool\n"
_KSERVE_POOL = "from remora_protos.kserve import pool as _descriptor_pool\n"


def tools_python() -> Path:
    """The interpreter of the pinned tools' own environment, made on first use."""
    home = ROOT / ".venv-protos"
    python = home / "bin" / "python"
    stamp = home / "tools.txt"
    if not stamp.exists() or stamp.read_text() != "\n".join(TOOLS):
        venv.create(home, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *TOOLS], check=True)
        stamp.write_text("\n".join(TOOLS))
    return python


def generate(out: Path) -> None:
    sources = sorted(str(p.relative_to(PROTOS)) for p in PROTOS.rglob("*.proto"))
    flags = [f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
    command = [tools_python(), "-W", "ignore", "-m", "grpc_tools.protoc", f"-I{PROTOS}"]
    subprocess.run([*map(str, command), *flags, *sources], check=True)
    for path in (out / OWN_POOL).rglob("*_pb2.py"):
        path.write_text(path.read_text().replace(_DEFAULT_POOL, _KSERVE_POOL))


def generated_files(root: Path) -> dict[str, Path]:
    package = root / "remora_protos"
    files = (p for p in package.rglob("*") if p.name.endswith(GENERATED))
    return {str(p.relative_to(root)): p for p in files}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only, change nothing")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        fresh, committed = generated_files(Path(scratch)), generated_files(PROTOS)
        if check:
            stale = [
                n
                for n, p in fresh.items()
                if n not in committed or not filecmp.cmp(p, committed[n], False)
            ]
            stale += [n for n in committed if n not in fresh]
            for name in stale:
                sys.stderr.write(f"out of date: protos/{name} (run: {Path(__file__).name})\n")
            return 1 if stale else 0
        for path in committed.values():
            path.unlink()
        for name, path in fresh.items():
            shutil.copyfile(path, PROTOS / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
