"""The events of one stream, joined into its result. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from remora_agent.client import results
from remora_agent.client.results import Delta, Result
from remora_agent.runtime.api import TokenLogprob
from remora_contract.errors import InternalFault, Refused, Unavailable
from remora_protos.inference.v1 import inference_pb2 as pb


@dataclass
class _Choice:
    texts: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt: tuple[TokenLogprob, ...] = ()
    finished: pb.Finished | None = None


class Transcript:
    """Of a call for `choices` answers."""

    def __init__(self, choices: int = 1) -> None:
        self.request_id = ""
        self._choices = [_Choice() for _ in range(choices)]

    @property
    def finished(self) -> bool:
        return all(choice.finished is not None for choice in self._choices)

    def add(self, event: object) -> Delta | None:
        """What it adds to an answer, if anything.

        Raises Unavailable when the stream just stopped, InternalFault for an unknown event.
        """
        if not isinstance(event, pb.GenerateEvent):
            raise Unavailable("the agent ended the stream before its last event; ask again")
        kind = event.WhichOneof("event")
        if kind not in ("accepted", "prompt", "delta", "finished") or event.choice >= len(
            self._choices
        ):
            raise InternalFault("the agent sent an event this client does not know; update it")
        choice = self._choices[event.choice]
        if kind == "accepted":
            self.request_id = event.accepted.request_id
        elif kind == "prompt":
            choice.prompt = tuple(map(results.token_logprob, event.prompt.tokens))
        elif kind == "finished":
            choice.finished = event.finished
        else:
            delta = results.delta(event.delta, event.choice)
            choice.texts.append(delta.text)
            choice.ids.extend(delta.token_ids)
            choice.logprobs.extend(delta.logprobs)
            return delta
        return None

    def result(self) -> Result:
        """The first answer, the others in its `more`. Raises Refused before the last event."""
        first, *more = map(self._result, self._choices)
        return replace(first, more=tuple(more))

    def _result(self, choice: _Choice) -> Result:
        if choice.finished is None:
            raise Refused("the stream has not ended; read it to the end first")
        text = "".join(choice.texts)
        made = results.ended(self.request_id, text, choice.ids, choice.finished, choice.logprobs)
        return replace(made, prompt_logprobs=choice.prompt)
