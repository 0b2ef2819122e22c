"""What a model says of itself: metadata, configuration, statistics. Pure."""

from __future__ import annotations

from remora_agent.serving.kserve.inputs import INPUTS, Input
from remora_agent.serving.kserve.outputs import OUTPUTS, Output
from remora_agent.serving.kserve.statistics import Counts, Duration
from remora_protos.kserve.v2 import grpc_service_pb2 as pb
from remora_protos.kserve.v2 import model_config_pb2 as config_pb

SERVER = "remora"
PLATFORM = "remora"
# Of the protocol's extensions, those that are answered here.
EXTENSIONS = (
    "model_repository",
    "model_repository(unload_dependents)",
    "model_configuration",
    "parameters",
    "statistics",
)
_CONFIG_TYPES = {
    "BYTES": config_pb.TYPE_STRING,
    "BOOL": config_pb.TYPE_BOOL,
    "INT32": config_pb.TYPE_INT32,
    "UINT32": config_pb.TYPE_UINT32,
    "UINT64": config_pb.TYPE_UINT64,
    "FP32": config_pb.TYPE_FP32,
}


def metadata(name: str, versions: tuple[str, ...]) -> pb.ModelMetadataResponse:
    """`name`: as the client asked."""
    response = pb.ModelMetadataResponse(name=name, versions=versions, platform=PLATFORM)
    for given in INPUTS.values():
        response.inputs.add(name=given.name, datatype=given.datatype, shape=_dims(given))
    for made in OUTPUTS.values():
        response.outputs.add(name=made.name, datatype=made.datatype, shape=_dims(made))
    return response


def config(name: str, bundle_digest: str, context_tokens: int) -> config_pb.ModelConfig:
    """No batches: a request is one prompt, and the scheduler joins those of many requests."""
    made = config_pb.ModelConfig(
        name=name,
        platform=PLATFORM,
        backend=PLATFORM,
        max_batch_size=0,
        model_transaction_policy=config_pb.ModelTransactionPolicy(decoupled=True),
    )
    for given in INPUTS.values():
        data_type = _CONFIG_TYPES[given.datatype]
        optional = not given.required
        made.input.add(name=given.name, data_type=data_type, dims=_dims(given), optional=optional)
    for output in OUTPUTS.values():
        data_type = _CONFIG_TYPES[output.datatype]
        made.output.add(name=output.name, data_type=data_type, dims=_dims(output))
    made.parameters["bundle_digest"].string_value = bundle_digest
    made.parameters["context_tokens"].string_value = str(context_tokens)
    return made


def model_statistics(name: str, version: str, counts: Counts) -> pb.ModelStatistics:
    stats = pb.InferStatistics(
        success=_duration(counts.success),
        fail=_duration(counts.fail),
        queue=_duration(counts.queue),
        compute_input=_duration(counts.around),
        compute_infer=_duration(counts.infer),
    )
    return pb.ModelStatistics(
        name=name,
        version=version,
        last_inference=counts.last_ms,
        inference_count=counts.success.count,
        execution_count=counts.success.count,
        inference_stats=stats,
    )


def _duration(duration: Duration) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=duration.count, ns=duration.ns)


def _dims(tensor: Input | Output) -> list[int]:
    return [-1 if tensor.many else 1]
