"""Sliding windows of the installed ONNX Runtime."""

from __future__ import annotations

from remora_agent.engine.ort import windows


def test_the_installed_kernel_is_one_whose_window_is_known():
    assert windows.window_excess() in (0, 1)
