"""The served model again, as tritonclient reaches it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tritonclient.grpc as triton_client


@pytest.fixture
def triton(served) -> Iterator[triton_client.InferenceServerClient]:
    with triton_client.InferenceServerClient(served.address) as client:
        yield client


@pytest.fixture
def text(served):
    """`text(prompt, count, mix)`: the text that a request must get, whatever else runs."""

    def solo(prompt: str, count: int = 8, mix: dict[str, float] | None = None) -> str:
        return served.client.detokenize(served.solo(prompt, count, mix))

    return solo
