"""The emulator has the names, signatures and defaults of the real wheel.

Needs the wheel tensorrt-edgellm 0.11.0 unpacked (`REMORA_EDGELLM_WHEEL` names the directory), the
Python that it is for, and a C compiler: the module's types are there without a GPU once the
libraries that it links are, so empty ones stand for TensorRT's and the driver's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from remora_agent.edgellm.child import Child, Patience
from remora_contract.errors import Unsupported
from tests.support import edgellm_emulator as emulator

_MISSING = ("libnvinfer.so.10", "libnvonnxparser.so.10", "libcuda.so.1")
_TYPES = (
    "LLMGenerationRequest",
    "Message",
    "MessageContent",
    "Request",
    "StreamChannel",
    "StreamChunk",
    "LLMRuntime",
)
_PROBE = """
import importlib.util, json, sys
sys.setdlopenflags(0x101)
spec = importlib.util.spec_from_file_location("_edgellm_runtime", sys.argv[1])
api = importlib.util.module_from_spec(spec)
spec.loader.exec_module(api)
request = api.LLMGenerationRequest()
one = api.Request(messages=[api.Message("user", [api.MessageContent("text", "x")])])
one.stop_strings = ["a"]
request.requests = [one]
channel = api.StreamChannel.create()
channel.set_skip_special_tokens(True)
request.stream_channels = [channel]
defaults = {n: getattr(api.LLMGenerationRequest(), n) for n in (
    "temperature", "top_k", "top_p", "max_generate_length", "lora_weights_name")}
for name, value in dict(temperature=1.0, top_k=1, top_p=1.0, max_generate_length=3,
                        lora_weights_name="a", apply_chat_template=False,
                        add_generation_prompt=False, skip_special_tokens=True).items():
    setattr(request, name, value)
request.context_cache_lookup_policy = api.ContextCacheLookupPolicy.BYPASS
assert channel.wait_pop(timeout_ms=1) is None and channel.try_pop() is None
try:
    api.LLMRuntime("/nowhere", "", {"a": "/nowhere"})
    why = ""
except RuntimeError as e:
    why = str(e)
print(json.dumps({
    "members": {t: [n for n in dir(getattr(api, t))] for t in sys.argv[2].split(",")},
    "reasons": list(api.FinishReason.__members__),
    "defaults": defaults, "why": why,
    "handle": api.LLMRuntime.handle_request.__doc__, "init": api.LLMRuntime.__init__.__doc__,
    "count": api.LLMRuntime.count_prompt_tokens.__doc__,
}))
"""


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    unpacked, compiler = os.environ.get("REMORA_EDGELLM_WHEEL"), shutil.which("cc")
    if unpacked is None or compiler is None or sys.version_info[:2] != (3, 11):
        pytest.skip(
            "set REMORA_EDGELLM_WHEEL to the unpacked wheel 0.11.0, with Python 3.11 and cc"
        )
    folder = tmp_path_factory.mktemp("libraries")
    (folder / "empty.c").write_text("int remora_empty;\n")
    for name in _MISSING:
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name]
        subprocess.run([*command, folder / "empty.c"], check=True)
    payload = Path(unpacked) / "tensorrt_edgellm/_native/payloads/x86-ubuntu2204-cu13-sm80"
    (module,) = payload.glob("_edgellm_runtime*.so")
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, str(module), ",".join(_TYPES)],
        env={**os.environ, "LD_LIBRARY_PATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", _TYPES)
def test_every_member_of_the_emulator_is_one_of_the_wheels(real, name):
    ours = {
        m for m in dir(getattr(emulator, name)) if not m.startswith("_") and not m.endswith("_")
    }
    assert ours <= set(real["members"][name])


def test_the_runtime_is_made_and_asked_as_the_wheel_says(real):
    for word in (
        "engine_dir: str, multimodal_engine_dir: str = '', lora_weights_map",
        "checkpoint",
    ):
        assert word in real["init"]
    assert "request: _edgellm_runtime.LLMGenerationRequest) ->" in real["handle"]
    assert "-> list[int]" in real["count"]


def test_reasons_and_defaults_are_the_wheels(real):
    assert real["reasons"] == [r.name for r in emulator.FinishReason]
    request = emulator.LLMGenerationRequest()
    assert real["defaults"] == {n: getattr(request, n) for n in real["defaults"]}


def test_without_a_driver_the_runtime_says_so(real):
    assert "CUDA" in real["why"]


def test_the_real_wheel_says_why_it_does_not_run_here(tmp_path, monkeypatch):
    """Through the process and the lines that every request takes."""
    unpacked = os.environ.get("REMORA_EDGELLM_WHEEL")
    if unpacked is None or Path("/dev/nvidia0").exists():
        pytest.skip("set REMORA_EDGELLM_WHEEL to the unpacked wheel, on a machine without a GPU")
    paths = filter(None, [os.environ.get("PYTHONPATH"), unpacked])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    with pytest.raises(Unsupported, match=r"^TensorRT Edge-LLM cannot run on this device: \w+"):
        Child(tmp_path, {}, Patience(open_s=60.0))
