"""A bundle, a tokenizer, listeners and adapters for runtimes on the reference engine."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from remora_agent.bank.directory import AdapterDirectory, Registered
from remora_agent.runtime.api import (
    AdapterRef,
    Delta,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    SamplingParams,
    StoppingParams,
)
from remora_agent.text.pipeline import TextPipeline
from remora_agent.text.tokenizer import TextTokenizer
from remora_contract.bundle import (
    FORMAT_VERSION,
    GRAPH_FILE,
    Bundle,
    BundleFile,
    GraphSpec,
    SourceInfo,
)
from remora_contract.decoder import DecoderSpec, RopeSpec
from remora_contract.digests import digest_bytes
from tests.support.adapters import random_tensors, write_sidecar

EOS = 256
VOCAB = 258


def make_bundle(context: int = 64, max_bank_rank: int = 16) -> Bundle:
    decoder = DecoderSpec(
        "llama", 1, 8, 2, 1, 4, 16, VOCAB, 1e-5, RopeSpec(10000.0), max_position=context
    )
    return Bundle(
        FORMAT_VERSION,
        digest_bytes(b"base"),
        decoder,
        GraphSpec("native", "float32", context, max_bank_rank, 24),
        (BundleFile(GRAPH_FILE, 1, digest_bytes(b"g")),),
        (EOS,),
        None,
        None,
        SourceInfo("tiny", "llama", "float32"),
        "remora test",
    )


def byte_tokenizer(special: str = "<pad>") -> tokenizers.Tokenizer:
    """One token per byte: id = the byte in byte-level BPE's alphabet; then <eos> and `special`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>", special])
    return tokenizer


def byte_text() -> TextPipeline:
    return TextPipeline(TextTokenizer(byte_tokenizer(), 1 << 16), None)


def add_adapter(
    directory: AdapterDirectory,
    bundle: Bundle,
    path: Path,
    name: str,
    revision: str,
    *,
    seed: int,
    r: int = 4,
    invocation_tokens: tuple[int, ...] = (),
) -> Registered:
    """Writes a real sidecar of random tensors to `path` and registers it."""
    tensors = random_tensors(bundle.decoder, seed=seed, r=r, projections=("q", "v"))
    write_sidecar(path, bundle.base_digest, tensors, invocation_tokens=invocation_tokens)
    return directory.register(name, revision, path)


def request(
    request_id: str,
    prompt: tuple[int, ...] = (1, 2, 3),
    max_tokens: int = 8,
    adapters: Mapping[str, float] | None = None,
    sampling: SamplingParams | None = None,
    deadline_s: float | None = None,
    **stopping,
) -> GenerationRequest:
    """Greedy and without end of sequence unless told."""
    return GenerationRequest(
        request_id,
        prompt,
        tuple(AdapterRef(n, None, w) for n, w in (adapters or {}).items()),
        sampling or SamplingParams(),
        StoppingParams(max_tokens, **{"ignore_eos": True, **stopping}),
        deadline_s,
    )


class Listener:
    """Collects a request's events; `wait` blocks until the last one."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._ended = threading.Event()
        self._heard = threading.Condition()

    def __call__(self, event: Event) -> None:
        with self._heard:
            self.events.append(event)
            self._heard.notify_all()
        if isinstance(event, Finished | Failed):
            self._ended.set()

    def wait(self, timeout_s: float = 20) -> Listener:
        assert self._ended.wait(timeout_s), f"no end after {self.events}"
        return self

    def wait_tokens(self, count: int, timeout_s: float = 20) -> None:
        with self._heard:
            assert self._heard.wait_for(lambda: len(self.tokens) >= count, timeout_s), self.events

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(t for e in self.events if isinstance(e, Delta) for t in e.token_ids)

    @property
    def text(self) -> str:
        return "".join(e.text for e in self.events if isinstance(e, Delta))

    @property
    def finished(self) -> Finished:
        assert isinstance(self.events[-1], Finished), self.events[-1]
        return self.events[-1]

    @property
    def error(self):
        assert isinstance(self.events[-1], Failed), self.events[-1]
        return self.events[-1].error
