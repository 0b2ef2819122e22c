"""One tree of errors, one translation: every error crosses a real call and comes back itself."""

from concurrent import futures

import grpc
import pytest

from remora_contract import errors, rpc
from remora_contract.errors import Refusal

LEAVES = list(errors.all_errors())


def _make(cls):
    if cls is errors.Incompatible:
        return cls([Refusal("memory", "8 GiB", "4 GiB")])
    return cls("what and what next")


@pytest.fixture(scope="module")
def call():
    def handler(request, context):
        cls = next(c for c in LEAVES if c.__name__ == request.decode())
        context.abort_with_status(rpc.to_status(_make(cls)))

    method = grpc.unary_unary_rpc_method_handler(handler)
    server = grpc.server(futures.ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", {"M": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel.unary_unary("/t.T/M")
    server.stop(None).wait()


@pytest.mark.parametrize("cls", LEAVES, ids=lambda c: c.__name__)
def test_every_error_crosses_the_wire_as_itself(call, cls):
    with pytest.raises(grpc.RpcError) as caught:
        call(cls.__name__.encode(), timeout=60)
    error = rpc.from_rpc_error(caught.value)
    assert type(error) is (errors.Refused if cls is errors.Incompatible else cls)
    assert caught.value.code().name == cls.code
    assert str(error) == str(_make(cls))


def test_every_code_is_a_grpc_status():
    assert {cls.code for cls in LEAVES} <= {code.name for code in grpc.StatusCode}


def test_retry_after_travels():
    status = rpc.to_status(errors.Exhausted("queue full", retry_after_s=1.5))
    assert status.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert status.trailing_metadata


def test_an_error_that_another_part_derives_travels_as_what_it_derives_from():
    class FieldOdd(errors.RequestInvalid):
        pass

    assert FieldOdd not in set(errors.all_errors())
    status = rpc.to_status(FieldOdd("temperature is odd"))
    (_, packed), *_ = status.trailing_metadata
    assert b"RequestInvalid" in packed and b"FieldOdd" not in packed


@pytest.mark.parametrize("cls", LEAVES)
def test_an_error_made_anew_is_the_same_without_who_raised_it(cls):
    kept = cls("later", 2.5) if cls is errors.Exhausted else _make(cls)
    try:
        raise kept from ValueError("why")
    except errors.RemoraError as e:
        made = errors.anew(e)
    assert type(made) is cls and str(made) == str(kept) and vars(made) == vars(kept)
    assert made.__traceback__ is made.__cause__ is made.__context__ is None
