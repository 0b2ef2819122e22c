"""An emulated Jetson for the real jtop service: a small /fake_sys tree, which jetson-stats reads
under its own testing switch (JTOP_TESTING).

`python -m tests.support.jtop_board serve` runs the service until its input ends;
`… read` prints what JetsonSource reads from it. Both need root and jetson-stats.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

FAKE_SYS = Path("/fake_sys")
SOCKET = Path("/run/jtop.sock")
GPU = "17000000.gpu"


def write_board() -> None:
    gpu = FAKE_SYS / "devices/platform" / GPU
    devfreq = gpu / "devfreq" / GPU
    files = {
        devfreq / "cur_freq": "918000000",
        devfreq / "max_freq": "1020000000",
        devfreq / "min_freq": "306000000",
        devfreq / "governor": "nvhost_podgov",
        devfreq / "device/of_node/name": "gpu",
        devfreq / "device/load": "430",
        devfreq / "device/railgate_enable": "0",
        devfreq / "device/tpc_pg_mask": "0",
        devfreq / "device/enable_3d_scaling": "1",
        FAKE_SYS / "stat": "cpu  100 0 100 1000 0 0 0 0 0 0\ncpu0 100 0 100 1000 0 0 0 0 0 0\n",
        FAKE_SYS / "kernel/debug/clk/placeholder": "",
    }
    rails = FAKE_SYS / "bus/i2c/devices/1-0040"
    hwmon = rails / "hwmon/hwmon3"
    files[rails / "name"] = "ina3221"
    for port, (name, millivolts, milliamperes) in enumerate(
        [("VDD_IN", 5000, 1240), ("VDD_CPU_GPU_CV", 5000, 300)], start=1
    ):
        files[hwmon / f"in{port}_label"] = name
        files[hwmon / f"in{port}_input"] = str(millivolts)
        files[hwmon / f"curr{port}_input"] = str(milliamperes)
        files[hwmon / f"curr{port}_max"] = "32760"
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    cpu = FAKE_SYS / "devices/system/cpu/cpu0/cpufreq"
    cpu.mkdir(parents=True)
    for name in ("scaling", "cpuinfo"):
        for what, value in (("min", "0"), ("max", "2035200"), ("cur", "200000")):
            (cpu / f"{name}_{what}_freq").write_text(value)
    (cpu / "scaling_governor").write_text("schedutil")
    links = FAKE_SYS / "class/devfreq"
    links.mkdir(parents=True)
    (links / GPU).symlink_to(devfreq)


def serve() -> None:
    os.environ["JTOP_TESTING"] = "1"
    from jtop import service
    from jtop.core import hardware

    if not Path("/sys/devices/virtual/dmi/id").is_dir():  # a virtual machine without DMI
        hardware.get_x86_64_variables = dict
    # The service gives its socket to the group jtop, which a test machine does not have.
    service.JTOP_USER = "root"
    write_board()
    server = service.JtopServer()
    server.start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()
    server.close()
    server.config_clear()


def read() -> None:
    from remora_agent.telemetry.jetson import JetsonSource

    source = JetsonSource(interval_s=0.5)
    readings = {r.wire_name: r.value for r in source.read()}
    source.close()
    sys.stdout.write(json.dumps(readings))


if __name__ == "__main__":
    {"serve": serve, "read": read}[sys.argv[1]]()
