"""Settings shared by all tests."""

import os

from hypothesis import HealthCheck, settings

# Shared machines are slow at times: a slow example is not a failed one.
settings.register_profile(
    "remora",
    deadline=None,
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("remora")

# ONNX Runtime reports to its maker unless told otherwise before it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
