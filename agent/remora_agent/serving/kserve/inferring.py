"""From requests to responses: the model's name is settled with the model that answers, and every
request is counted. Knows nothing of calls and streams.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from remora_agent.runtime.api import Finished
from remora_agent.serving.call import AdapterSelection, GenerateCall
from remora_agent.serving.driver import RequestDriver
from remora_agent.serving.kserve.names import Target, resolve
from remora_agent.serving.kserve.request import Inference
from remora_agent.serving.kserve.responses import Responses, streamed, without_outputs
from remora_agent.serving.kserve.statistics import Statistics
from remora_agent.serving.limits import check_selection
from remora_agent.serving.served_model import ServedModel
from remora_contract.errors import InternalFault, RequestInvalid
from remora_protos.kserve.v2 import grpc_service_pb2 as pb


class Inferences:
    def __init__(self, driver: RequestDriver, statistics: Statistics) -> None:
        self._driver = driver
        self._statistics = statistics

    async def whole(self, inference: Inference, timeout_s: float | None) -> pb.ModelInferResponse:
        """The one response to a request that does not stream. Raises what `_answers` does."""
        async with aclosing(self._answers(inference, timeout_s)) as answers:
            async for answer, _ in answers:
                return answer
        raise InternalFault("the request ended without an answer; the log says why")

    async def streamed(
        self, inference: Inference, timeout_s: float | None
    ) -> AsyncGenerator[pb.ModelStreamInferResponse, None]:
        """Each says whether it is the final one. Where an empty final response is asked for, it
        comes last. Raises what `_answers` does."""
        async with aclosing(self._answers(inference, timeout_s)) as answers:
            async for answer, last in answers:
                empty = None
                if last and inference.empty_final:
                    empty = without_outputs(answer)
                yield streamed(answer, final=last and empty is None)
                if empty is not None:
                    yield streamed(empty, final=True)

    async def _answers(
        self, inference: Inference, timeout_s: float | None
    ) -> AsyncGenerator[tuple[pb.ModelInferResponse, bool], None]:
        """Responses, and whether each is the last. Leaving early cancels the request.

        `timeout_s`: what the call leaves; the request's own may be shorter. Raises NotFound for the
        model, RequestInvalid, Cancelled, and what the driver raises.
        """
        responses = Responses(inference)
        limit = min((t for t in (timeout_s, inference.timeout_s) if t is not None), default=None)
        with self._statistics.measuring() as measured:

            def settle(model: ServedModel, call: GenerateCall) -> GenerateCall:
                measured.target = _target(model, inference)
                responses.version = measured.target.version
                return replace(call, selection=_selection(measured.target, inference))

            async with aclosing(self._driver.events(inference.call, limit, settle)) as events:
                async for event in events:
                    for response in responses.of(event):
                        if isinstance(event, Finished):
                            measured.timings = event.timings
                        yield response, isinstance(event, Finished)


def _target(model: ServedModel, inference: Inference) -> Target:
    runtime = model.runtime
    base, directory = runtime.bundle.source.name, runtime.adapters.directory
    return resolve(inference.model_name, inference.model_version, base, directory)


def _selection(target: Target, inference: Inference) -> AdapterSelection:
    """Raises RequestInvalid when name and inputs both choose, or choose what cannot be."""
    if inference.selection is None:
        return target.selection
    if target.selection:
        raise RequestInvalid(
            f"model {target.name} chooses adapters, and the inputs do too; ask for the base model "
            "or leave adapter, lora_name and use_case out"
        )
    return check_selection(inference.selection)
