"""The events of one stream, joined into its result. Pure."""

from __future__ import annotations

from remora_agent.client import results
from remora_agent.client.results import Result
from remora_agent.runtime.api import Delta
from remora_contract.errors import InternalFault, Refused, Unavailable
from remora_protos.inference.v1 import inference_pb2 as pb


class Transcript:
    def __init__(self) -> None:
        self.request_id = ""
        self._texts: list[str] = []
        self._ids: list[int] = []
        self._finished: pb.Finished | None = None

    @property
    def finished(self) -> bool:
        return self._finished is not None

    def add(self, event: object) -> Delta | None:
        """What it adds to the answer, if anything.

        Raises Unavailable when the stream just stopped, InternalFault for an unknown event.
        """
        if not isinstance(event, pb.GenerateEvent):
            raise Unavailable("the agent ended the stream before its last event; ask again")
        kind = event.WhichOneof("event")
        if kind == "accepted":
            self.request_id = event.accepted.request_id
        elif kind == "delta":
            self._texts.append(event.delta.text)
            self._ids.extend(event.delta.token_ids)
            return Delta(event.delta.text, tuple(event.delta.token_ids))
        elif kind == "finished":
            self._finished = event.finished
        else:
            raise InternalFault("the agent sent an event this client does not know; update it")
        return None

    def result(self) -> Result:
        """Raises Refused before the last event."""
        if self._finished is None:
            raise Refused("the stream has not ended; read it to the end first")
        return results.ended(self.request_id, "".join(self._texts), self._ids, self._finished)
