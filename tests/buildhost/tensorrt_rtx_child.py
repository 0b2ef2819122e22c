"""Child process of test_tensorrt_rtx: parses and builds one graph, reports as one line of JSON."""

from __future__ import annotations

import json
import sys

import tensorrt_rtx as trt


class Log(trt.ILogger):
    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.warnings: list[str] = []
        self.errors: list[str] = []

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        if severity == trt.ILogger.Severity.WARNING:
            self.warnings.append(message)
        elif severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
            self.errors.append(message)


def configured(builder: trt.Builder, request: dict) -> tuple[trt.IBuilderConfig, list[int]]:
    """For all the request's processors at once; what each profile was added as, -1 for dropped."""
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(request["processors"])
    for i, name in enumerate(request["processors"]):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), i)
    added = []
    for shapes in request["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (least, typical, most) in shapes.items():
            profile.set_shape(name, tuple(least), tuple(typical), tuple(most))
        added.append(config.add_optimization_profile(profile))
    return config, added


def main() -> None:
    request = json.loads(sys.stdin.read())
    log = Log()
    builder = trt.Builder(log)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    parsed = parser.parse_from_file(request["graph"])
    log.errors += [str(parser.get_error(i)) for i in range(parser.num_errors)]
    report = {"errors": log.errors, "warnings": log.warnings, "engine_bytes": 0}
    if parsed:
        report["inputs"] = [network.get_input(i).name for i in range(network.num_inputs)]
        report["outputs"] = [network.get_output(i).name for i in range(network.num_outputs)]
        config, report["profiles"] = configured(builder, request)
        engine = builder.build_serialized_network(network, config)
        report["engine_bytes"] = 0 if engine is None else engine.nbytes
    print(json.dumps(report))


if __name__ == "__main__":
    main()
