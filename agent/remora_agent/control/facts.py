"""What this machine is, for `Join` and `Sync`. Reads the system; decides nothing."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import uuid
from functools import cache
from importlib import metadata
from pathlib import Path

import psutil

from remora_contract.memory_need import Sizing
from remora_contract.trt_memory import GpuMemory
from remora_protos.control.v1 import control_pb2 as pb

# Backend name -> distribution that brings it.
BACKENDS = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt": ("tensorrt", "tensorrt-cu12", "tensorrt-cu13"),
    "tensorrt_rtx": ("tensorrt-rtx",),
    "edgellm": ("tensorrt-edgellm",),
}
_MACHINE_ID_FILES = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))
_MODEL_FILE = Path("/proc/device-tree/model")


def machine_facts(disk: Path) -> pb.DeviceFacts:
    """`disk` is any path on the file system that holds the state directory, existing or not."""
    return pb.DeviceFacts(
        machine_id=machine_id(),
        hostname=socket.gethostname(),
        agent_version=agent_version(),
        architecture=platform.machine(),
        device_model=device_model(),
        memory_bytes=psutil.virtual_memory().total,
        disk_free_bytes=max(1, disk_free(disk)),  # 0 would mean that it is not known
        backends=installed_backends(),
        cores=os.cpu_count() or 1,
    )


def setting_facts(sizing: Sizing, disk_floor: int) -> pb.DeviceFacts:
    """What the configuration adds to them."""
    return pb.DeviceFacts(
        engine_rows=sizing.rows,
        engine_context=sizing.context or 0,
        memory_floor_bytes=sizing.floor_bytes,
        disk_floor_bytes=disk_floor,
    )


def gpu_facts(gpu: GpuMemory | None) -> pb.DeviceFacts:
    if gpu is None:
        return pb.DeviceFacts()
    return pb.DeviceFacts(gpu_memory_bytes=gpu.bytes, gpu_shares_memory=gpu.is_shared)


@cache
def agent_version() -> str:
    return metadata.version("remora")


def disk_free(path: Path) -> int:
    """Bytes an ordinary process may still write on the path's file system."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


@cache
def machine_id() -> str:
    """Stable per machine and not the secret-ish machine-id itself, as machine-id(5) asks."""
    for path in _MACHINE_ID_FILES:
        if path.is_file() and (text := path.read_text().strip()):
            return hashlib.sha256(f"remora {text}".encode()).hexdigest()[:32]
    return f"{uuid.getnode():012x}"


@cache
def device_model() -> str:
    """The board's name where a device tree tells it, else the processor's."""
    if _MODEL_FILE.is_file():
        return _MODEL_FILE.read_text().rstrip("\0\n")
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


@cache
def installed_backends() -> dict[str, str]:
    found = {}
    for backend, distributions in BACKENDS.items():
        for distribution in distributions:
            try:
                found[backend] = metadata.version(distribution)
                break
            except metadata.PackageNotFoundError:
                continue
    return found
