"""Prompts read beside decode steps: who waits for whom, and that answers are the same."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

from remora_agent.runtime import speculation
from remora_agent.runtime.api import Failed, Finished
from remora_agent.runtime.model_runtime import ModelRuntime
from remora_contract.errors import EngineFault
from tests.agent.runtime.manual import manual_runtime
from tests.support.overlap_engine import OverlapEngine
from tests.support.reference_engine import ReferenceEngine
from tests.support.runtime import VOCAB, Listener, byte_text, make_bundle, request

CONTEXT = 96
PROMPTS = {"a": (1, 2, 3), "b": tuple(range(20, 60)), "c": tuple(range(60, 75))}


def run(engine: ReferenceEngine, tmp_path, act: Callable | None = None) -> dict[str, list]:
    """All prompts sent, the first earlier; every event by request."""
    heard: dict[str, list] = {name: [] for name in PROMPTS}
    bundle = make_bundle(CONTEXT, 4)
    with manual_runtime(engine, bundle, tmp_path, clock=lambda: 0.0) as (runtime, loop, _):
        for i, (name, prompt) in enumerate(PROMPTS.items()):
            runtime.submit(request(name, prompt, 12), heard[name].append)
            for _ in range(3 if i == 0 else 0):
                loop.step()
        if act is not None:
            act(runtime, loop)
        for _ in range(200):
            loop.step()
    return heard


def tokens(events: list) -> tuple[int, ...]:
    return tuple(t for e in events for t in getattr(e, "token_ids", ()))


def test_answers_are_those_of_one_thing_after_the_other_and_steps_went_on(tmp_path):
    serial = run(ReferenceEngine(3, CONTEXT, VOCAB, 4), tmp_path / "serial")
    engine = OverlapEngine(3, CONTEXT, VOCAB, 4)
    beside = run(engine, tmp_path / "beside")
    for name in PROMPTS:
        assert isinstance(beside[name][-1], Finished)
        assert tokens(beside[name]) == tokens(serial[name]) != ()
    assert engine.beside


def test_a_chunk_that_fails_ends_its_request_and_no_other(tmp_path):
    engine = OverlapEngine(3, CONTEXT, VOCAB, 4, asks=1 << 30)

    def break_the_end(runtime, loop):
        while engine._begun is None:
            loop.step()
        whole = engine.end_prefill

        def failing():
            whole()
            engine.end_prefill = whole
            raise EngineFault("no such luck")

        engine.end_prefill = failing

    heard = run(engine, tmp_path, break_the_end)
    ended = {name: type(events[-1]) for name, events in heard.items()}
    assert list(ended.values()).count(Failed) == 1 and ended["a"] is Finished


def test_a_chunk_that_cannot_be_begun_is_read_alone(tmp_path, caplog):
    engine = OverlapEngine(3, CONTEXT, VOCAB, 4)
    engine.refuse_begin.append(EngineFault("not now"))
    heard = run(engine, tmp_path)
    assert all(isinstance(events[-1], Finished) for events in heard.values())
    assert "engine.not_beside" in caplog.messages


def test_a_cancelled_prompt_leaves_its_row_when_the_engine_has_left_it(tmp_path):
    engine = OverlapEngine(3, CONTEXT, VOCAB, 4)

    def cancel(runtime, loop):
        while engine._begun is None:
            loop.step()
        assert runtime.cancel("b")
        loop.step()

    heard = run(engine, tmp_path, cancel)
    assert isinstance(heard["b"][-1], Finished) and heard["b"][-1].reason.value == "cancelled"
    assert isinstance(heard["c"][-1], Finished) and tokens(heard["c"])


def test_closing_over_a_chunk_ends_everything(tmp_path):
    engine = OverlapEngine(3, CONTEXT, VOCAB, 4, asks=1 << 30)
    heard: list = []
    with manual_runtime(engine, make_bundle(CONTEXT, 4), tmp_path, clock=lambda: 0.0) as parts:
        runtime, loop, _ = parts
        runtime.submit(request("a", PROMPTS["a"], 50), lambda e: None)
        for _ in range(3):
            loop.step()
        runtime.submit(request("b", PROMPTS["b"], 12), heard.append)
        while engine._begun is None:
            loop.step()
    assert isinstance(heard[-1], Failed) and engine._begun is None and engine.closed


def test_a_bug_in_the_engine_ends_everything_though_it_strikes_again(tmp_path, monkeypatch):
    caught: list = []
    broken: list = []
    all_here = threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda args: caught.append(args.exc_type))
    engine = OverlapEngine(3, CONTEXT, VOCAB, 4, asks=1 << 30)
    runtime = ModelRuntime(engine, make_bundle(CONTEXT, 4), byte_text())

    def break_beside():
        assert all_here.wait(20)
        if engine._begun is not None or broken:
            broken.append(True)
            raise ZeroDivisionError

    engine.before_step = break_beside
    heard = [Listener() for _ in PROMPTS]
    for (name, prompt), listener in zip(PROMPTS.items(), heard, strict=True):
        runtime.submit(request(name, prompt, 12), listener)
    all_here.set()
    for listener in heard:
        assert isinstance(listener.wait().error, EngineFault)
    runtime.close()
    assert caught == [ZeroDivisionError]


def test_nothing_is_drafted_beside_a_prompt(tmp_path, monkeypatch):
    """The engine proves a draft alone: the step would wait for the prompt, and teach what drafts
    cost wrongly."""
    monkeypatch.setattr(speculation, "lookup", lambda text, most: speculation.Guess((1,) * most, 2))
    monkeypatch.setattr(speculation, "best_length", lambda rate, seconds, most: min(4, most))
    engine = OverlapEngine(3, CONTEXT, VOCAB, 4, asks=5)
    heard: list = []
    with manual_runtime(engine, make_bundle(CONTEXT, 4), tmp_path, clock=lambda: 0.0) as parts:
        runtime, loop, _ = parts
        runtime.submit(request("a", PROMPTS["a"], 60), heard.append)
        while len(engine.calls.scores) < 3:
            loop.step()
        runtime.submit(request("b", PROMPTS["b"], 2), lambda e: None)
        while engine._begun is None:
            loop.step()
        before = len(engine.calls.scores), len(engine.calls.decodes)
        while engine._begun is not None:
            loop.step()
        assert len(engine.calls.scores) == before[0]
        assert len(engine.calls.decodes) > before[1]
        while not isinstance(heard[-1], Finished):
            loop.step()
    assert len(engine.calls.scores) > before[0]
    assert tokens(heard) == engine.solo(PROMPTS["a"], 60)


def test_a_prompt_whose_logprobs_are_wanted_is_read_alone(tmp_path):
    engine = OverlapEngine(3, CONTEXT, VOCAB, 4)
    heard: list = []
    with manual_runtime(engine, make_bundle(CONTEXT, 4), tmp_path, clock=lambda: 0.0) as parts:
        runtime, loop, _ = parts
        runtime.submit(request("a", PROMPTS["a"], 50), lambda e: None)
        for _ in range(3):
            loop.step()
        made = request("b", PROMPTS["b"], 2)
        made = replace(made, scoring=replace(made.scoring, prompt_top=0))
        runtime.submit(made, heard.append)
        for _ in range(30):
            loop.step()
    assert not engine.beside and isinstance(heard[-1], Finished)
