"""The runtime's process, without its agent."""

from __future__ import annotations

import os
import subprocess
import sys


def test_a_child_whose_agent_ended_before_it_began_opens_nothing(tmp_path):
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "remora_agent.edgellm.child_side", str(tmp_path / "task.json")]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert done.returncode == 1
    assert "has ended" in done.stderr
