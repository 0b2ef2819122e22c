"""Our definitions are the public ones, and live in one process with a client's."""

from __future__ import annotations

import subprocess
import sys

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tritonclient.grpc import model_config_pb2, service_pb2

from remora_protos.kserve.v2 import grpc_service_pb2 as ours
from remora_protos.kserve.v2 import model_config_pb2 as our_config

SERVICE = "inference.GRPCInferenceService"


def messages(descriptor):
    """Every message below, by its full name."""
    found = {}
    for message in getattr(descriptor, "message_types_by_name", {}).values():
        found[message.full_name] = message
    for message in list(found.values()):
        found |= nested(message)
    return found


def nested(message):
    found = {}
    for inner in message.nested_types:
        found[inner.full_name] = inner
        found |= nested(inner)
    return found


def fields(message):
    return {
        (f.name, f.number, f.type, f.is_repeated if hasattr(f, "is_repeated") else f.label)
        + ((f.message_type.full_name,) if f.message_type else ())
        for f in message.fields
    }


def test_the_services_messages_are_exactly_the_public_ones():
    mine, public = messages(ours.DESCRIPTOR), messages(service_pb2.DESCRIPTOR)
    assert set(mine) == set(public)
    for name in public:
        assert fields(mine[name]) == fields(public[name]), name


def test_the_services_methods_are_exactly_the_public_ones():
    def methods(descriptor):
        service = descriptor.services_by_name["GRPCInferenceService"]
        proto = descriptor_pb2.ServiceDescriptorProto()
        service.CopyToProto(proto)
        return [
            (m.name, m.input_type, m.output_type, m.client_streaming, m.server_streaming)
            for m in proto.method
        ]

    assert methods(ours.DESCRIPTOR) == methods(service_pb2.DESCRIPTOR)


def test_the_configurations_messages_are_a_part_of_the_public_ones():
    mine, public = messages(our_config.DESCRIPTOR), messages(model_config_pb2.DESCRIPTOR)
    for name in mine:
        assert fields(mine[name]) <= fields(public[name]), name
    types = our_config.DESCRIPTOR.enum_types_by_name["DataType"].values_by_name
    public_types = model_config_pb2.DESCRIPTOR.enum_types_by_name["DataType"].values_by_name
    assert {n: v.number for n, v in types.items()} == {n: v.number for n, v in public_types.items()}


@pytest.mark.parametrize("agent_first", [True, False])
def test_the_agent_and_a_client_load_in_one_process_in_either_order(agent_first):
    imports = ["import remora_agent.serving.server", "import tritonclient.grpc"]
    program = "; ".join(imports if agent_first else reversed(imports))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_reflection_gives_the_agents_definitions_beside_a_clients(served):
    with grpc.insecure_channel(served.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)

        def ask(**what):
            request = reflection_pb2.ServerReflectionRequest(**what)
            return next(iter(stub.ServerReflectionInfo(iter([request]), timeout=60)))

        listed = ask(list_services="").list_services_response.service
        assert SERVICE in {s.name for s in listed}
        files = [
            descriptor_pb2.FileDescriptorProto.FromString(blob)
            for blob in ask(
                file_containing_symbol=SERVICE
            ).file_descriptor_response.file_descriptor_proto
        ]
        assert [f.name.rpartition("/")[2] for f in files] == [
            "grpc_service.proto",
            "model_config.proto",
        ]
        own = ask(file_containing_symbol="remora.inference.v1.Inference")
        assert own.file_descriptor_response.file_descriptor_proto
        assert ask(file_containing_symbol="no.such.Thing").HasField("error_response")
