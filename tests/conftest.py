"""Settings shared by all tests."""

import os

from hypothesis import settings

# Shared machines are slow at times: a slow example is not a failed one.
settings.register_profile("remora", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("remora")

# ONNX Runtime reports to its maker unless told otherwise before it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
