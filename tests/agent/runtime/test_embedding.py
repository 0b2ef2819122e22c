"""Embeddings through the runtime: right vectors, in turn with answers, and nothing left behind."""

import threading
from dataclasses import replace

import numpy as np
import pytest

from remora_agent.runtime.api import AdapterRef, Delta, Failed, Finished
from remora_agent.runtime.embedding import Embedded, EmbeddingRequest, Pooling
from remora_agent.runtime.options import MAX_EMBEDDINGS, RuntimeOptions
from remora_contract.errors import (
    Cancelled,
    Conflict,
    DeadlineExceeded,
    EngineFault,
    Exhausted,
    NotFound,
    PromptTooLong,
    RequestInvalid,
    Unavailable,
    Unsupported,
)
from tests.support.reference_engine import HIDDEN, fault
from tests.support.runtime import request

PROMPTS = ((1, 2, 3), (4,), tuple(range(30)), (7, 8, 9, 10))


class Ear:
    """Hears one end."""

    def __init__(self) -> None:
        self.heard: list[Embedded | Failed] = []
        self._ended = threading.Event()

    def __call__(self, end: Embedded | Failed) -> None:
        self.heard.append(end)
        self._ended.set()

    def wait(self) -> Embedded | Failed:
        assert self._ended.wait(20)
        return self.heard[0]

    @property
    def error(self):
        end = self.wait()
        assert isinstance(end, Failed), end
        return end.error


def embed(s, prompts=PROMPTS, name="e", **more) -> Ear:
    ear = Ear()
    ear.cancel = s.runtime.embed(EmbeddingRequest(name, prompts, **more), ear)
    return ear


def states(s, prompt, mix=None) -> np.ndarray:
    """[tokens, HIDDEN] of the reference engine, alone."""
    state, found = np.zeros(HIDDEN), []
    for token in prompt:
        state = s.engine._next(state, token, mix or {})
        found.append(state)
    return np.array(found, np.float32).astype(np.float64)


def idle(s) -> bool:
    metrics = s.runtime.metrics()
    quiet = metrics["rows_busy"] == 0 and metrics["queue_depth"] == 0
    return quiet and all(i.leases == 0 for i in s.runtime.adapters.list())


@pytest.mark.parametrize("chunk", [1, 3, 256])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", Pooling)
def test_a_vector_is_the_pooled_states_of_its_prompt(serve, pooling, normalize, chunk):
    s = serve(options=RuntimeOptions(prefill_chunk=chunk))
    end = embed(s, pooling=pooling, normalize=normalize).wait()
    assert end.vectors.shape == (len(PROMPTS), HIDDEN) and end.vectors.dtype == np.float32
    assert end.prompt_tokens == tuple(map(len, PROMPTS))
    for vector, prompt in zip(end.vectors, PROMPTS, strict=True):
        found = states(s, prompt)
        wanted = found[-1] if pooling is Pooling.LAST else found.mean(axis=0)
        if normalize:
            wanted = wanted / np.linalg.norm(wanted)
        assert np.abs(vector - wanted).max() < 1e-6
    assert idle(s) and not s.engine.calls.prefills


def test_a_vector_goes_through_the_requests_adapters(serve):
    s = serve({"a": 4, "b": 4})
    mix = {"a": 0.5, "b": -2.0}
    adapters = tuple(AdapterRef(n, None, w) for n, w in mix.items())
    end = embed(s, ((5, 6, 7),), adapters=adapters, normalize=False).wait()
    wanted = states(s, (5, 6, 7), {s.digests[n]: w for n, w in mix.items()})[-1]
    assert np.abs(end.vectors[0] - wanted).max() < 1e-6
    assert [a.digest for a in end.provenance.adapters] == [s.digests["a"], s.digests["b"]]
    assert idle(s)


def test_an_activated_adapter_acts_from_its_invocation_in_each_prompt(serve):
    s = serve({"a": 4}, invocations={"a": (9, 9)})
    prompts = ((9, 9, 1, 2), (1, 2, 3, 9, 9, 4), (1, 2))
    end = embed(s, prompts, adapters=(AdapterRef("a"),), normalize=False).wait()
    for vector, prompt, begin in zip(end.vectors, prompts, (0, 3, 2), strict=True):
        state = np.zeros(HIDDEN)
        for i, token in enumerate(prompt):
            state = s.engine._next(state, token, {s.digests["a"]: 1.0} if i >= begin else {})
        assert np.abs(vector - state).max() < 1e-6


def test_generation_goes_on_beside_a_long_list(serve):
    s = serve(rows=2, options=RuntimeOptions(prefill_chunk=4))
    gate = threading.Event()
    s.engine.before_step = lambda: gate.wait(20)
    r, ear, tokens, earlier = request("a", (1, 2), 12), Ear(), [], []

    def hear(event):  # on the step thread, as the list's end is
        if isinstance(event, Delta):
            tokens.extend(event.token_ids)
        elif isinstance(event, Finished):
            earlier.append(not ear.heard)

    s.runtime.embed(EmbeddingRequest("e", (tuple(range(40)),) * 20), ear)
    s.runtime.submit(r, hear)
    gate.set()
    assert len(ear.wait().vectors) == 20
    assert tuple(tokens) == tuple(s.solo(r))
    assert earlier == [True]  # the answer was not kept waiting for two hundred chunks


def test_a_list_is_never_more_than_two_of_the_rows_and_places(serve):
    s = serve(rows=4)
    most = []
    s.engine.before_step = lambda: most.append(
        s.runtime.metrics()["rows_busy"] + s.runtime.metrics()["queue_depth"]
    )
    embed(s, PROMPTS * 10).wait()
    assert max(most) <= 2


def test_a_list_that_has_begun_is_not_refused_halfway_by_a_full_queue(serve):
    s = serve(rows=1, options=RuntimeOptions(max_waiting=2))
    crowd, refused = [], []

    def fill_the_queue():
        try:
            while True:
                crowd.append(s.submit(request(f"r{len(crowd)}", (1,), 1)))
        except Exhausted:
            refused.append(1)

    s.engine.before_step = fill_the_queue
    end = embed(s, PROMPTS * 4).wait()
    s.engine.before_step = lambda: None
    assert isinstance(end, Embedded) and len(end.vectors) == 16 and refused
    for heard in crowd:
        heard.wait()


def test_a_model_that_drains_finishes_the_list_that_has_begun(serve):
    s = serve(rows=1)
    gate = threading.Event()
    s.engine.before_step = lambda: gate.wait(20)
    ear = embed(s, PROMPTS * 5)
    s.runtime.drain(0.0)
    with pytest.raises(Unavailable, match="draining"):
        embed(s, name="later")
    gate.set()
    assert s.runtime.drain(20)
    assert len(ear.wait().vectors) == 20 and idle(s)


def test_a_cancelled_list_ends_and_leaves_nothing(serve):
    s = serve({"a": 4}, rows=2)
    gate, stopped = threading.Event(), threading.Event()

    def wait():
        stopped.set()
        assert gate.wait(20)

    s.engine.before_step = wait
    ear = embed(s, PROMPTS * 20, adapters=(AdapterRef("a"),))
    assert stopped.wait(20)
    ear.cancel()
    gate.set()
    assert isinstance(ear.error, Cancelled)
    assert len(ear.heard) == 1 and s.runtime.drain(20) and idle(s)
    assert len(s.engine.calls.embeds) <= 2


@pytest.mark.parametrize("prompts", [((9, 9, 1),), ((1, 9, 9), (9, 9, 1, 2), (3,))])
def test_a_list_may_end_before_its_submission_returns(serve, monkeypatch, prompts):
    """As when the submitting thread loses the processor right after its first prompt is queued."""
    s = serve({"a": 4}, invocations={"a": (9, 9)})
    ear, wake, submitting = Ear(), s.runtime._loop.wake, threading.get_ident()

    def wake_and_lose_the_processor():
        wake()
        if threading.get_ident() == submitting:
            ear.wait()

    monkeypatch.setattr(s.runtime._loop, "wake", wake_and_lose_the_processor)
    s.runtime.embed(EmbeddingRequest("e", prompts, (AdapterRef("a"),)), ear)
    end = ear.wait()
    assert isinstance(end, Embedded) and len(end.vectors) == len(prompts)
    (adapter,) = end.provenance.adapters  # of the first prompt
    assert adapter.active_from == prompts[0].index(9)
    monkeypatch.undo()
    assert idle(s)


def test_a_fault_ends_the_list_once(serve):
    s = serve()
    s.engine.faults.append(fault("the backend failed"))
    ear = embed(s)
    assert isinstance(ear.error, EngineFault)
    assert embed(s, name="next").wait().vectors.shape == (4, HIDDEN)
    assert len(ear.heard) == 1 and idle(s)


def test_states_that_are_not_numbers_are_a_fault(serve):
    s = serve()
    s.engine._embed[7] = np.nan
    assert isinstance(embed(s).error, EngineFault)


def test_a_deadline_ends_the_list(serve):
    now = [0.0]
    s = serve(clock=lambda: now[0])
    s.engine.before_step = lambda: now.__setitem__(0, now[0] + 1.0)
    error = embed(s, PROMPTS * 5, deadline_s=3.5).error
    assert isinstance(error, DeadlineExceeded | Exhausted)  # at the latest, or foreseen
    assert idle(s)


def test_closing_the_runtime_ends_the_list(serve):
    s = serve()
    gate = threading.Event()
    s.engine.before_step = lambda: gate.wait(20)
    ear = embed(s, PROMPTS * 5)
    threading.Timer(0.05, gate.set).start()
    s.runtime.close()
    assert isinstance(ear.error, Unavailable) and len(ear.heard) == 1


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"prompts": ()}, RequestInvalid, f"1 to {MAX_EMBEDDINGS} inputs, not 0"),
        ({"prompts": ((1,),) * 257}, RequestInvalid, "not 257"),
        ({"prompts": ((1,), ())}, RequestInvalid, r"inputs\[1\]: the prompt is empty"),
        ({"prompts": ((1,), (1,) * 64)}, PromptTooLong, r"inputs\[1\]: the prompt has 64 tokens"),
        ({"prompts": ((1,), (1, -1))}, RequestInvalid, r"inputs\[1\]: token -1"),
        ({"adapters": (AdapterRef("no"),)}, NotFound, "no"),
        ({"adapters": (AdapterRef("a"), AdapterRef("a"))}, RequestInvalid, "twice"),
        ({"deadline_s": -1.0}, DeadlineExceeded, "had passed"),
        ({"name": ""}, RequestInvalid, "request_id"),
    ],
)
def test_what_cannot_be_embedded_is_refused_by_name(serve, more, error, words):
    s = serve({"a": 4})
    with pytest.raises(error, match=words):
        embed(s, **more)
    assert idle(s)


def test_more_tokens_than_may_wait_are_refused(serve):
    s = serve(options=RuntimeOptions(max_waiting_tokens=20))
    with pytest.raises(RequestInvalid, match="38 tokens together; at most 20"):
        embed(s)


def test_an_engine_without_states_refuses(serve):
    s = serve()
    blind = replace(s.engine.limits, hidden=0)
    s.runtime._intake = replace(s.runtime._intake, limits=blind)
    with pytest.raises(Unsupported, match="cannot embed"):
        embed(s)


def test_an_id_in_use_is_refused_and_a_full_queue_too(serve):
    s = serve(rows=1, options=RuntimeOptions(max_waiting=1))
    gate, stopped = threading.Event(), threading.Event()

    def wait():
        stopped.set()
        assert gate.wait(20)

    s.engine.before_step = wait
    ear = embed(s, ((1, 2),))
    assert stopped.wait(20)
    with pytest.raises(Conflict):
        embed(s, ((1, 2),))
    s.submit(request("waits"))
    with pytest.raises(Exhausted):
        embed(s, name="other")
    gate.set()
    assert isinstance(ear.wait(), Embedded)
