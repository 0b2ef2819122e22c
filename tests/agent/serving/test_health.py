"""grpc.health.v1: the state of the services, told to all who watch."""

from __future__ import annotations

import queue
import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.agent.serving.company import slowly

Status = health_pb2.HealthCheckResponse


class Watcher:
    """What one watcher of a name hears, on a connection of its own."""

    def __init__(self, address: str, service: str = "") -> None:
        self.heard: queue.Queue[int] = queue.Queue()
        self._channel = grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])
        request = health_pb2.HealthCheckRequest(service=service)
        self._call = health_pb2_grpc.HealthStub(self._channel).Watch(request)
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        try:
            for said in self._call:
                self.heard.put(said.status)
        except grpc.RpcError:
            return  # it left, or the server has stopped

    def wait_for(self, status: int) -> None:
        while self.heard.get(timeout=30) != status:
            pass

    def leave(self) -> None:
        self._call.cancel()
        self._thread.join()
        self._channel.close()


@pytest.mark.parametrize("service", ["", "remora.inference.v1.Inference"])
def test_a_watcher_hears_of_the_drain_after_another_one_has_left(served, service):
    first, second = Watcher(served.address, service), Watcher(served.address, service)
    try:
        for watcher in (first, second):
            watcher.wait_for(Status.SERVING)
        first.leave()
        slowly(served.engine)
        stream = served.client.stream("x", max_tokens=60, ignore_eos=True)
        next(stream)
        draining = threading.Thread(target=served.stack.stop, args=(20.0,))
        draining.start()
        second.wait_for(Status.NOT_SERVING)
        list(stream)
        draining.join()
    finally:
        second.leave()


def test_a_name_that_is_no_service_is_unknown(served):
    with grpc.insecure_channel(served.address) as channel:
        ask = health_pb2.HealthCheckRequest(service="nobody")
        stub = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Check(ask, timeout=20)
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        watching = stub.Watch(ask, timeout=20)
        assert next(watching).status == Status.SERVICE_UNKNOWN
        watching.cancel()
