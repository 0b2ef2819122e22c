"""`python -m remora_agent.edgellm.child_side TASK_FILE`: TensorRT Edge-LLM's runtime, in a process
that it may take down. The one module that touches its wheel. See `lines` for what it says.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from remora_agent.edgellm.lines import line_of, parse
from remora_agent.edgellm.module import MODULE
from remora_agent.edgellm.request import Question
from remora_agent.engine.child_side import die_with_parent
from remora_contract.errors import EngineFault, RemoraError, RequestInvalid, Unsupported
from remora_contract.strict import loads

_POLL_MS = 50

Say = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Task:
    engine_directory: str
    adapters: dict[str, str]  # key -> safetensors file


class Session:
    """One runtime and the request that it computes."""

    def __init__(self, api: Any, runtime: Any, say: Say) -> None:
        self._api, self._runtime, self._say = api, runtime, say
        self._lock = threading.Lock()
        self._channel: Any = None

    def cancel(self) -> None:
        with self._lock:
            if self._channel is not None:
                self._channel.cancel()

    def answer(self, question: Question) -> None:
        """Says chunks and an end. Raises RequestInvalid where the two tokenizers disagree, and what
        the runtime raises."""
        request = self._counted(question)
        channel = self._api.StreamChannel.create()
        channel.set_skip_special_tokens(True)
        request.stream_channels = [channel]
        with self._lock:
            self._channel = channel
        failures: list[Exception] = []
        worker = threading.Thread(target=self._run, args=(request, channel, failures))
        worker.start()
        try:
            reason, counted = self._follow(channel, worker)
        finally:
            worker.join()
            with self._lock:
                self._channel = None
        if failures:
            raise failures[0]
        if reason is None:
            reason = channel.get_reason()
        self._say({"say": "end", "reason": self._named(reason), "prompt_tokens": counted})

    def _run(self, request: Any, channel: Any, failures: list[Exception]) -> None:
        try:
            self._runtime.handle_request(request)
        except Exception as e:  # noqa: BLE001  # told by the thread that follows the channel
            failures.append(e)
            channel.cancel()

    def _follow(self, channel: Any, worker: threading.Thread) -> tuple[Any, int]:
        """Until the answer's end; its reason, where the channel told one, and the prompt's length
        as the runtime counted it (-1: it did not)."""
        counted = -1
        while True:
            chunk = channel.wait_pop(timeout_ms=_POLL_MS)
            if chunk is None:
                if not worker.is_alive() and (chunk := channel.try_pop()) is None:
                    return None, counted
                if chunk is None:
                    continue
            counted = max(counted, chunk.prompt_token_count)
            self._say({"say": "chunk", "text": chunk.text, "ids": list(chunk.token_ids)})
            if chunk.finished:
                return chunk.reason, counted

    def _named(self, reason: Any) -> str:
        """Raises EngineFault for an answer that did not end in order."""
        reasons = self._api.FinishReason
        names = {
            reasons.END_ID: "stop",
            reasons.STOP_WORDS: "stop",
            reasons.LENGTH: "length",
            reasons.CANCELLED: "cancelled",
        }
        for known, name in names.items():
            if reason == known:
                return name
        raise EngineFault(f"TensorRT Edge-LLM ended an answer with {reason}; its log says why")

    def _counted(self, question: Question) -> Any:
        """The request whose prompt the runtime reads as the agent does: with the beginning-of-text
        token written out, or left to it."""
        texts = [question.prompt]
        if question.bos and question.prompt.startswith(question.bos):
            texts.append(question.prompt.removeprefix(question.bos))
        counts = []
        for text in texts:
            request = self._request(question, text)
            (count,) = self._runtime.count_prompt_tokens(request)
            if count == question.prompt_tokens:
                return request
            counts.append(str(count))
        raise RequestInvalid(
            f"the prompt has {question.prompt_tokens} tokens with the bundle's tokenizer and "
            f"{' or '.join(counts)} with the engine's; wrap the engine with the tokenizer of its "
            "own checkpoint"
        )

    def _request(self, question: Question, text: str) -> Any:
        api, request = self._api, self._api.LLMGenerationRequest()
        one = api.Request(messages=[api.Message("user", [api.MessageContent("text", text)])])
        one.stop_strings = list(question.stop)
        request.requests = [one]
        request.temperature = question.temperature
        request.top_k = question.top_k
        request.top_p = question.top_p
        request.max_generate_length = question.max_tokens
        request.lora_weights_name = question.adapter
        request.apply_chat_template = False  # the agent has rendered the bundle's
        request.add_generation_prompt = False
        request.skip_special_tokens = True
        request.context_cache_lookup_policy = api.ContextCacheLookupPolicy.BYPASS
        return request


def open_session(task: Task, say: Say) -> Session:
    """Raises Unsupported where the wheel does not load (no GPU, another SM), EngineFault where the
    engine does not."""
    try:
        api = import_module(f"{MODULE}.runtime").load()
    except Exception as e:  # every one of its own errors, and the loader's
        raise Unsupported(f"TensorRT Edge-LLM cannot run on this device: {e}") from e
    try:
        runtime = api.LLMRuntime(task.engine_directory, "", dict(task.adapters))
        runtime.capture_decoding_cuda_graph()
    except Exception as e:
        raise EngineFault(f"TensorRT Edge-LLM does not open the engine: {e}") from e
    return Session(api, runtime, say)


def serve(session: Session, say: Say) -> None:
    """Until standard input ends."""
    asked: queue.Queue[Question | None] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin.buffer:
            message = parse(line)
            if message["do"] == "cancel":
                session.cancel()
            else:
                asked.put(Question(**{**message["question"], "stop": _stops(message)}))
        session.cancel()
        asked.put(None)

    threading.Thread(target=listen, daemon=True).start()
    while (question := asked.get()) is not None:
        _answer(session, question, say)


def _answer(session: Session, question: Question, say: Say) -> None:
    try:
        session.answer(question)
    except RemoraError as e:
        say(_error(e))
    except Exception as e:  # noqa: BLE001  # whatever its native code raises ends one request
        say(_error(EngineFault(f"TensorRT Edge-LLM failed: {e}")))


def _stops(message: dict[str, Any]) -> tuple[str, ...]:
    return tuple(message["question"]["stop"])


def _error(e: RemoraError) -> dict[str, Any]:
    return {"say": "error", "error": type(e).__name__, "message": str(e)}


def main() -> int:
    die_with_parent(sys.stdout.fileno())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the agent says when
    # What native code prints to standard output must not come between the lines.
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    lock = threading.Lock()

    def say(message: dict[str, Any]) -> None:
        with lock:
            out.write(line_of(message))

    path = Path(sys.argv[1])
    try:
        session = open_session(loads(Task, path.read_bytes(), str(path)), say)
    except RemoraError as e:
        say(_error(e))
        return 1
    say({"say": "ready"})
    serve(session, say)
    return 0


if __name__ == "__main__":
    sys.exit(main())
