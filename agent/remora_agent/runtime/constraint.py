"""Answers that match a grammar: which tokens may come next, by llguidance.

A grammar is compiled once, on one of a few threads and within limits, and then started for each
answer, which advances it token by token. A grammar that outgrows its limits on the way ends its
answer with an error. Knows nothing of requests and engines.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock, get_ident
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora_agent.runtime.api import Constraint
from remora_agent.runtime.grammar import grammar_text
from remora_contract.errors import Exhausted, RequestInvalid, Unavailable, Unsupported

MAX_PENDING = 16  # grammars that wait to be compiled
MAX_KEPT = 16  # compiled grammars kept for the next request
COMPILE_TIMEOUT_S = 10.0
# A compilation cannot be ended from outside: one that takes longer keeps its thread, the others go
# on, and when all are kept so, constraints are refused until one ends.
WORKERS = 3
# What one grammar may cost: seconds while it is compiled, milliseconds a token, memory.
_LIMITS: dict[str, Any] = {
    "max_grammar_size": 20_000,  # symbols
    "initial_lexer_fuel": 1_000_000,  # about 20 ms
    "step_lexer_fuel": 100_000,  # about 7 ms
    "step_max_items": 20_000,  # about 1 ms
    "max_items_in_row": 2_000,
    "max_lexer_states": 16_000,  # of 1 to 2 kB
    "verbose_errors": False,
}
_MESSAGE_CHARS = 300
# What llguidance says by a name alone.
_WORDS = {
    "NoExtensionBias": "no text satisfies it",
    "NoExtension": "no text satisfies it",
    "ParserTooComplex": "it is too ambiguous to be followed; make it simpler",
    "LexerTooComplex": "its expressions are too large to be followed; make them simpler",
}

# Bytes by token id, and the ids of special tokens.
Vocabulary = Callable[[], tuple[list[bytes], list[int]]]


class Matcher:
    """Where one answer stands in its grammar. Not thread-safe."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def finished(self) -> bool:
        """Nothing but the end may follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self, vocab: int) -> NDArray[np.bool_]:
        """[vocab]: which tokens may come next; end-of-sequence only where the grammar is
        complete. Raises RequestInvalid when the grammar has become too complex."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(bits, count=min(vocab, 8 * len(bits)), bitorder="little")
        if len(allowed) < vocab:
            allowed = np.concatenate([allowed, np.zeros(vocab - len(allowed), np.uint8)])
        return allowed.view(np.bool_)

    def advance(self, token: int) -> None:
        """`token` was drawn, one of those allowed. Raises RequestInvalid."""
        self._matcher.consume_token(token)
        self._check()

    def accepts(self, tokens: Sequence[int]) -> int:
        """How many of `tokens` may come next, one after another; nothing changes."""
        return int(self._matcher.validate_tokens(list(tokens)))

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestInvalid(
                "constraint: the answer cannot go on within the grammar's limits: "
                f"{_said(self._matcher)}"
            )


class Grammar:
    """A compiled constraint. Thread-safe."""

    def __init__(self, matcher: Any) -> None:
        self._first = matcher
        self._lock = Lock()

    def start(self) -> Matcher:
        """For one answer; costs microseconds."""
        with self._lock:
            return Matcher(self._first.deep_copy())


class GrammarCompiler:
    """Of one model: `vocabulary` is read, and llguidance imported, when the first constraint comes.

    `eos` are the model's end-of-sequence tokens, `vocab` the length of its logits.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        vocab: int,
        eos: Sequence[int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._vocabulary, self._vocab = vocabulary, vocab
        self._eos = [t for t in eos if 0 <= t < vocab]
        self._tokenizer: Any = None
        self._kept: OrderedDict[Constraint, Grammar] = OrderedDict()
        self._lock = Lock()
        self._pending = 0
        self._closed = False
        self._clock = clock
        self._began: dict[int, float] = {}  # when each thread began what it compiles
        self._vocabulary_lock = Lock()
        self._workers = ThreadPoolExecutor(WORKERS, "grammar")

    def compile(self, constraint: Constraint) -> Future[Grammar]:
        """Never waits. The future raises RequestInvalid with what is wrong with the grammar,
        Unsupported for a tokenizer that grammars cannot run over. Raises RequestInvalid (bounds),
        Exhausted (too many wait, or every thread is at one for too long)."""
        text = grammar_text(constraint)
        with self._lock:
            if constraint in self._kept:
                self._kept.move_to_end(constraint)
                done: Future[Grammar] = Future()
                done.set_result(self._kept[constraint])
                return done
            if self._pending >= MAX_PENDING:
                raise Exhausted(f"{self._pending} grammars wait to be compiled", retry_after_s=1.0)
            if self._stuck() >= WORKERS:
                raise Exhausted(
                    f"{WORKERS} constraints take longer than {COMPILE_TIMEOUT_S:g} s to compile, "
                    "and no thread is left for this one; try again later or leave it out",
                    retry_after_s=COMPILE_TIMEOUT_S,
                )
            if self._closed:
                raise _ended()
            self._pending += 1
            future = self._workers.submit(self._compile, constraint, text)
        future.add_done_callback(self._done)
        return future

    def close(self) -> None:
        """Grammars that wait fail with Unavailable."""
        with self._lock:  # `compile` submits within it
            self._closed = True
        self._workers.shutdown(wait=False)

    def _done(self, _: Future[Grammar]) -> None:
        with self._lock:
            self._pending -= 1

    def _stuck(self) -> int:
        since = self._clock() - COMPILE_TIMEOUT_S
        return sum(began < since for began in self._began.values())

    def _compile(self, constraint: Constraint, text: str) -> Grammar:
        thread = get_ident()
        with self._lock:
            self._began[thread] = self._clock()
        try:
            return self._compiled(constraint, text)
        finally:
            with self._lock:
                del self._began[thread]

    def _compiled(self, constraint: Constraint, text: str) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits

        if self._closed:
            raise _ended()
        matcher = LLMatcher(
            self._over_tokens(), text, log_level=0, limits=LLParserLimits(**_LIMITS)
        )
        if not matcher.is_error():
            matcher.compute_bitmask()  # some faults show with the first token only
        if matcher.is_error():
            raise RequestInvalid(f"constraint ({constraint.kind.value}): {_said(matcher)}")
        grammar = Grammar(matcher)
        with self._lock:
            self._kept[constraint] = grammar
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        return grammar

    def _over_tokens(self) -> Any:
        """llguidance's view of the vocabulary: a trie of the tokens' bytes."""
        with self._vocabulary_lock:
            if self._tokenizer is None:
                if not self._eos:
                    raise Unsupported(
                        "constraint: the bundle names no end-of-sequence token, so that an answer "
                        "could not end; export it again with one"
                    )
                self._tokenizer = _tokenizer(*self._vocabulary(), self._vocab, self._eos)
            return self._tokenizer


def _tokenizer(tokens: list[bytes], special: list[int], vocab: int, eos: list[int]) -> Any:
    try:
        from llguidance import LLTokenizer, TokenizerWrapper
    except ImportError as e:
        raise Unsupported("constraint needs the package llguidance: pip install llguidance") from e
    return LLTokenizer(TokenizerWrapper(_Words(tokens, special, eos[0])), vocab, eos)


class _Words:
    """What llguidance asks of a tokenizer. It tokenises only to prefer some ways to write a text,
    which nothing here uses."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int], eos: int) -> None:
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special, eos
        self._of = {text: token for token, text in enumerate(tokens) if len(text) == 1}

    def __call__(self, text: bytes) -> list[int]:
        single = (self._of.get(text[i : i + 1]) for i in range(len(text)))
        return [token for token in single if token is not None]


def _ended() -> Unavailable:
    return Unavailable("the model is being taken down; try again")


def _said(matcher: Any) -> str:
    """llguidance's words, without the state it prints behind them."""
    text = str(matcher.get_error()).split("<state>")[0].replace("<non-verbose/>", "").strip()
    return _WORDS.get(text, text[:_MESSAGE_CHARS])
