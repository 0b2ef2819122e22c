"""Stands for `tensorrt_edgellm.runtime` of the wheel 0.11.0, whose names, signatures and defaults
`test_edgellm_wheel.py` compares with this file. Pure Python; no GPU.

It answers the tokens of a text that depends on the prompt's tokens and on the bytes of the adapter,
so that a test sees which one acted. Failures on request: EMULATED_EDGELLM is a comma-separated list
of no_gpu, slow (a token takes 50 ms) and adds_bos; a prompt with `CRASH`, `RAISE` or `HANG` in it
does that.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import deque
from enum import Enum
from pathlib import Path

from tokenizers import Tokenizer

FLAGS = frozenset(os.environ.get("EMULATED_EDGELLM", "").split(","))


class NativeDetectionError(RuntimeError):
    pass


def load():
    if "no_gpu" in FLAGS:
        raise NativeDetectionError("Required system library 'cuda' was not found.")
    return __import__(__name__, fromlist=["x"])


class FinishReason(Enum):
    NOT_FINISHED = 0
    END_ID = 1
    LENGTH = 2
    CANCELLED = 3
    ERROR = 4
    STOP_WORDS = 5


class ContextCacheLookupPolicy(Enum):
    USE_CACHE = 0
    BYPASS = 1


class MessageContent:
    __slots__ = ("content", "type")

    def __init__(self, type, content):
        self.type, self.content = type, content


class Message:
    __slots__ = ("contents", "role")

    def __init__(self, role, contents):
        self.role, self.contents = role, contents


class Request:
    __slots__ = ("logit_bias", "messages", "sampling_seed", "stop_strings")

    def __init__(self, messages=()):
        self.messages, self.stop_strings = messages, []


class LLMGenerationRequest:
    __slots__ = (
        "add_generation_prompt",
        "apply_chat_template",
        "context_cache_lookup_policy",
        "lora_weights_name",
        "max_generate_length",
        "num_logprobs",
        "requests",
        "sampling_seed",
        "skip_special_tokens",
        "stream_channels",
        "temperature",
        "top_k",
        "top_p",
    )

    def __init__(self):
        self.requests, self.stream_channels = [], []
        self.temperature, self.top_k, self.top_p = 0.0, 0, 0.0
        self.max_generate_length, self.lora_weights_name = 0, ""
        self.apply_chat_template = self.add_generation_prompt = self.skip_special_tokens = True
        self.context_cache_lookup_policy = ContextCacheLookupPolicy.USE_CACHE
        self.num_logprobs = 0


class StreamChunk:
    __slots__ = ("finished", "logprobs", "prompt_token_count", "reason", "text", "token_ids")


class StreamChannel:
    def __init__(self):
        self._chunks, self._changed = deque(), threading.Condition()
        self._cancelled, self._skip, self._reason = False, False, FinishReason.NOT_FINISHED

    @staticmethod
    def create():
        return StreamChannel()

    def set_skip_special_tokens(self, skip):
        self._skip = skip

    def wait_pop(self, timeout_ms):
        with self._changed:
            self._changed.wait_for(lambda: self._chunks, timeout_ms / 1000)
            return self.try_pop()

    def try_pop(self):
        with self._changed:
            return self._chunks.popleft() if self._chunks else None

    def is_finished(self):
        return self._reason is not FinishReason.NOT_FINISHED

    def is_cancelled(self):
        return self._cancelled

    def get_reason(self):
        return self._reason

    def cancel(self):
        self._cancelled = True

    def push_(self, text, ids, count, reason):
        chunk = StreamChunk()
        chunk.text, chunk.token_ids, chunk.prompt_token_count = text, ids, count
        chunk.finished, chunk.reason = reason is not FinishReason.NOT_FINISHED, reason
        with self._changed:
            self._reason = reason
            self._chunks.append(chunk)
            self._changed.notify_all()


class LLMGenerationResponse:
    pass


class LLMRuntime:
    def __init__(
        self,
        engine_dir,
        multimodal_engine_dir="",
        lora_weights_map={},  # noqa: B006  # as the wheel says it
        checkpoint_dir="",
        context_cache_config=None,
    ):
        folder = Path(engine_dir)
        config = json.loads((folder / "config.json").read_text())["builder_config"]
        if (folder / "llm.engine").read_bytes().startswith(b"BROKEN"):
            raise RuntimeError("deserializeCudaEngine failed: the plan file does not match")
        self._max = config["max_kv_cache_capacity"]
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._adapters = {"": 0}
        for name, path in lora_weights_map.items():
            data = Path(path).read_bytes()
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            if not header or not all(
                n.endswith((".lora_A.weight", ".lora_B.weight")) for n in header
            ):
                raise RuntimeError(f"LoRA weights {path} have unknown tensors")
            self._adapters[name] = hashlib.sha256(data).digest()[0] + 1
        print("emulated runtime opened with", sorted(self._adapters), flush=True)

    def capture_decoding_cuda_graph(self):
        return True

    def count_prompt_tokens(self, request):
        return [len(self._ids(request, r)) for r in request.requests]

    def handle_request(self, request):
        (one,), (channel,) = request.requests, request.stream_channels
        ids, text = self._ids(request, one), one.messages[0].contents[0].content
        if "CRASH" in text:
            os._exit(134)
        if "RAISE" in text:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        while "HANG" in text:
            time.sleep(1)
        adapter = self._adapters[request.lora_weights_name]  # KeyError: it was not opened with it
        assert request.temperature > 0
        assert request.top_p > 0
        written = ""
        for i in range(request.max_generate_length):
            letter = answer_letter(ids, i, adapter)
            token = self._tokenizer.token_to_id(letter) or ord(letter)
            piece = self._tokenizer.decode([token])
            written += piece
            last = i + 1 == request.max_generate_length or len(ids) + i + 1 == self._max
            reason = FinishReason.LENGTH if last else FinishReason.NOT_FINISHED
            if any(stop in written for stop in one.stop_strings):
                reason = FinishReason.STOP_WORDS
            if channel.is_cancelled():
                reason = FinishReason.CANCELLED
            if "slow" in FLAGS:
                time.sleep(0.05)
            channel.push_(piece, [token], len(ids), reason)
            if reason is not FinishReason.NOT_FINISHED:
                break
        return LLMGenerationResponse()

    def _ids(self, request, one):
        assert not request.apply_chat_template, "only texts are emulated"
        text = "".join(c.content for m in one.messages for c in m.contents)
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self._tokenizer.token_to_id("<eos>") or 0, *ids] if "adds_bos" in FLAGS else ids


def answer_letter(prompt, index, adapter):
    return chr(ord("a") + (sum(prompt) + 7 * index + 3 * adapter) % 26)
