"""What cannot be sent ends in an error of our own tree before anything is sent."""

from __future__ import annotations

import asyncio

import pytest

from remora_agent.client import AsyncClient, Client
from remora_contract.errors import RequestInvalid

HALF = "\udc00"  # of a surrogate pair
CALLS = [
    ("generate", (HALF,), {}),
    ("generate", ("x",), {"request_id": HALF}),
    ("generate", ("x",), {"adapter": "a@"}),
    ("generate", ("x",), {"stop": [HALF]}),
    ("generate", ("x",), {"seed": -1}),
    ("embed", ([HALF],), {}),
    ("embed", (["x"],), {"use_case": HALF}),
    ("embed", (["x"],), {"adapter": {HALF: 1.0}}),
    ("tokenize", (HALF,), {}),
    ("tokenize", ([{"role": "user", "content": HALF}],), {}),
    ("detokenize", ([-1],), {}),
    ("detokenize", (["x"],), {}),
    ("cancel", (HALF,), {}),
    ("register_adapter", (HALF, "/x"), {}),
    ("load_adapter", (HALF,), {}),
    ("unload_adapter", (HALF,), {}),
    ("set_alias", ("x", HALF), {}),
    ("set_alias", ("x", "1"), {"expected_epoch": -1}),
    ("pin_adapter", (HALF,), {}),
    ("capacity", (-1,), {}),
    ("set_use_case", (HALF, {"a": 1.0}), {}),
    ("set_use_case", ("u", {"a@": 1.0}), {}),
    ("delete_use_case", (HALF,), {}),
]


@pytest.mark.parametrize(("method", "arguments", "options"), CALLS)
def test_what_cannot_be_sent_is_refused_by_the_client(method, arguments, options):
    with Client("127.0.0.1:1") as client, pytest.raises(RequestInvalid):
        getattr(client, method)(*arguments, **options)


def test_the_async_client_refuses_it_too():
    async def ask() -> None:
        async with AsyncClient("127.0.0.1:1") as client:
            await client.tokenize(HALF)

    with pytest.raises(RequestInvalid, match="cannot be sent"):
        asyncio.run(ask())
