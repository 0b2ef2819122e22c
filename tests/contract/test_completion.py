"""Every command of Remora completes its words in a shell, without loading what is heavy."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CHILD = """
import sys
from importlib import import_module
sys.argv = [{name!r}]
try:
    import_module({module!r}).main()
finally:
    assert not {{"onnx", "onnxruntime", "numpy"}} & set(sys.modules)
"""
COMMANDS = {
    "remora": ("remora_controller.operator_cli.app", "rel", "releases"),
    "remora-build": ("remora_build.cli", "insert", "insert-lora"),
    "remora-agent": ("remora_agent.cli", "doc", "doctor"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_shell_completes_the_words_of_a_command(name: str) -> None:
    module, begun, whole = COMMANDS[name]
    assert completed(name, module, begun) == [whole]


def test_a_shell_completes_the_value_of_an_option() -> None:
    module, *_ = COMMANDS["remora-agent"]
    assert completed("remora-agent", module, "serve --tool-format gran") == ["granite"]


def completed(name: str, module: str, begun: str) -> list[str]:
    variables = {
        f"_{name.upper().replace('-', '_')}_COMPLETE": "complete_bash",
        "COMP_WORDS": f"{name} {begun}",
        "COMP_CWORD": str(len(begun.split())),
    }
    child = subprocess.run(
        [sys.executable, "-c", CHILD.format(name=name, module=module)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert child.stderr == ""
    return child.stdout.split()
