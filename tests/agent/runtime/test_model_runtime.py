"""Whole requests on the reference engine: every answer is the one the request gets alone."""

import itertools
import random
import threading

import pytest

from remora_agent.bank.directory import AdapterDirectory
from remora_agent.runtime.api import (
    Accepted,
    AdapterRef,
    Delta,
    Finished,
    FinishReason,
    SamplingOverrides,
    SamplingParams,
    StoppingOverrides,
)
from remora_agent.runtime.defaults import GenerationDefaults
from remora_agent.runtime.options import RuntimeOptions
from remora_agent.runtime.scheduler import Scheduler
from remora_agent.runtime.status import RuntimeState
from remora_contract.errors import (
    Conflict,
    DeadlineExceeded,
    EngineFault,
    Exhausted,
    NotFound,
    PromptTooLong,
    RequestInvalid,
    Unavailable,
)
from remora_contract.release import SamplingDefaults
from tests.agent.runtime.manual import manual_runtime
from tests.support.reference_engine import ReferenceEngine, fault
from tests.support.runtime import EOS, VOCAB, Listener, byte_tokenizer, make_bundle, request


def hold(engine):
    """Stops the engine before its next step; set the event to go on."""
    go, stopped = threading.Event(), threading.Event()

    def wait():
        stopped.set()
        assert go.wait(20)

    engine.before_step = wait
    return go, stopped


def test_a_request_gets_the_tokens_it_gets_alone(serve):
    s = serve()
    r = request("a", prompt=(5, 6, 7), max_tokens=10)
    heard = s.submit(r).wait()
    assert heard.tokens == s.solo(r)
    assert isinstance(heard.events[0], Accepted)
    assert heard.finished.reason is FinishReason.LENGTH
    assert (heard.finished.usage.prompt_tokens, heard.finished.usage.completion_tokens) == (3, 10)


def test_mixed_adapters_in_one_batch_do_not_mix(serve):
    s = serve({"a": 4, "b": 4})
    requests = [
        request(f"{i}", (i + 1, 2 * i + 1), 12, mix)
        for i, mix in enumerate([{}, {"a": 1.0}, {"b": 1.0}, {"a": 0.5, "b": 2.0}] * 3)
    ]
    for r, heard in [(r, s.submit(r)) for r in requests]:
        assert heard.wait().tokens == s.solo(r)
        assert [a.digest for a in heard.finished.provenance.adapters] == [
            s.digests[a.name] for a in r.adapters
        ]
    assert s.runtime.adapters.info("a").leases == 0


def test_more_adapters_than_fit_all_get_their_answers(serve):
    """Five adapters of which two fit, eighty requests of every mix, from four threads."""
    s = serve(dict.fromkeys("abcde", 8), rows=3, options=RuntimeOptions(patience_s=0.01))
    chance, done = random.Random(1), []
    mixes = [{}, *({n: 1.0} for n in "abcde"), {"a": 0.5, "b": 0.5}, {"d": 2.0, "e": -1.0}]
    requests = [
        request(f"{i}", tuple(chance.choices(range(200), k=chance.randint(1, 20))), 6, mix)
        for i, mix in enumerate(chance.choices(mixes, k=80))
    ]

    def client(mine):
        done.extend((r, s.submit(r)) for r in mine)

    threads = [threading.Thread(target=client, args=(requests[i::4],)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(20)
    assert len(done) == 80
    for r, heard in done:
        assert heard.wait().tokens == s.solo(r), r
    assert all(i.leases == 0 for i in s.runtime.adapters.list())
    metrics = s.runtime.metrics()
    assert metrics["adapter_evictions"] > 0 and metrics["adapter_loads"] >= 5
    assert (metrics["requests"], metrics["failures"], metrics["tokens"]) == (80, 0, 480)


def test_a_long_prompt_is_read_in_chunks_while_others_keep_answering(serve):
    s = serve(rows=2, options=RuntimeOptions(prefill_chunk=4))
    go, stopped = hold(s.engine)
    short, long = request("short", (1,), 12), request("long", tuple(range(40)), 4)
    heard_short = s.submit(short)
    assert stopped.wait(20)
    heard_long = s.submit(long)
    s.engine.before_step = lambda: None
    go.set()
    assert heard_long.wait().tokens == s.solo(long)
    assert heard_short.wait().tokens == s.solo(short)
    assert [n for row, _, n in s.engine.calls.prefills if n > 1] == [4] * 10
    alone = [rows for rows in s.engine.calls.decodes if len(rows) == 1]
    assert len(alone) >= 9  # `short` moved between the chunks of `long`


def test_an_answer_is_the_text_of_its_tokens(serve):
    s = serve()
    heard = s.submit(request("a", max_tokens=50)).wait()
    assert heard.text == byte_tokenizer().decode(list(heard.tokens))


def test_a_stop_string_ends_the_text_before_it_wherever_tokens_break(serve):
    s = serve()
    r = request("a", max_tokens=40)
    whole = byte_tokenizer().decode(list(s.solo(r)))
    at = next(i for i in range(3, 30) if "\ufffd" not in whole[i : i + 3])
    stop = whole[at : at + 3]
    heard = s.submit(request("b", max_tokens=40, stop=(stop, "no such"))).wait()
    assert heard.text == whole[: whole.index(stop)]
    assert heard.finished.reason is FinishReason.STOP and heard.finished.stop_match == stop
    assert heard.finished.usage.completion_tokens == len(heard.tokens) < 40


def test_end_of_sequence_and_stop_tokens_end_an_answer_without_their_text(serve):
    s = serve()
    tokens = s.solo(request("a", max_tokens=8))
    heard = s.submit(request("a", stop_token_ids=(tokens[4],))).wait()
    assert heard.tokens == tokens[: tokens.index(tokens[4]) + 1]
    assert heard.finished.reason is FinishReason.STOP and heard.finished.stop_match == ""
    prompt = next(
        (i, j)
        for i, j in itertools.product(range(60), repeat=2)
        if EOS in s.solo(request("", (i, j), 20))
    )
    heard = s.submit(request("b", prompt, 20, ignore_eos=False)).wait()
    assert heard.tokens[-1] == EOS and EOS not in heard.tokens[:-1]
    assert "<eos>" not in heard.text


def test_a_seed_repeats_an_answer_whatever_runs_beside_it(serve):
    s = serve()
    sampled = SamplingParams(1.0, top_k=40, top_p=0.9, seed=5)
    first = s.submit(request("a", max_tokens=20, sampling=sampled)).wait().tokens
    others = [
        s.submit(request(f"o{i}", max_tokens=20, sampling=SamplingParams(2.0))) for i in range(3)
    ]
    assert s.submit(request("b", max_tokens=20, sampling=sampled)).wait().tokens == first
    assert len({o.wait().tokens for o in others}) == 3


def test_max_tokens_is_clipped_to_the_context(serve):
    s = serve(context=16)
    heard = s.submit(request("a", tuple(range(10)), max_tokens=100)).wait()
    assert len(heard.tokens) == 6 and heard.finished.reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"prompt": ()}, RequestInvalid, "empty"),
        ({"prompt": (1,) * 64}, PromptTooLong, "64 tokens.*64"),
        ({"prompt": (VOCAB,)}, RequestInvalid, f"{VOCAB}"),
        ({"prompt": (-1,)}, RequestInvalid, "-1"),
        ({"max_tokens": 0}, RequestInvalid, "max_tokens"),
        ({"stop": ("",)}, RequestInvalid, "stop string"),
        ({"stop": ("x",) * 17}, RequestInvalid, "17 stop strings"),
        ({"stop_token_ids": (1,) * 257}, RequestInvalid, "stop_token_ids"),
        ({"sampling": SamplingParams(-0.1)}, RequestInvalid, "temperature"),
        ({"sampling": SamplingParams(float("nan"))}, RequestInvalid, "temperature"),
        ({"sampling": SamplingParams(1, top_k=-1)}, RequestInvalid, "top_k"),
        ({"sampling": SamplingParams(1, top_p=0)}, RequestInvalid, "top_p"),
        ({"sampling": SamplingParams(1, seed=1 << 64)}, RequestInvalid, "seed"),
        ({"adapters": {"nobody": 1.0}}, NotFound, "nobody"),
        ({"adapters": {"a": float("inf")}}, RequestInvalid, "weight"),
        ({"adapters": {"a": 1, "b": 1}}, Exhausted, "rank 20.*16"),
        ({"request_id": ""}, RequestInvalid, "request_id"),
        ({"deadline_s": 0.0}, DeadlineExceeded, "deadline"),
    ],
)
def test_a_bad_request_is_refused_at_once_by_name(serve, changes, error, words):
    s = serve({"a": 10, "b": 10})
    with pytest.raises(error, match=words):
        s.submit(request(**{"request_id": "r", **changes}))
    assert s.runtime.status().queued == 0


def test_an_adapter_named_twice_is_refused(serve):
    s = serve({"a": 4})
    r = request("r", adapters={"a": 1.0})
    with pytest.raises(RequestInvalid, match="twice"):
        s.submit(type(r)(**{**vars(r), "adapters": (AdapterRef("a"), AdapterRef("a"))}))


def test_a_full_queue_refuses_and_says_when_to_come_back(serve):
    s = serve(rows=1, options=RuntimeOptions(max_waiting=2))
    go, stopped = hold(s.engine)
    heard = [s.submit(request("0"))]
    assert stopped.wait(20)
    heard += [s.submit(request(f"{i}")) for i in (1, 2)]
    with pytest.raises(Exhausted) as caught:
        s.submit(request("3"))
    assert caught.value.retry_after_s > 0
    with pytest.raises(Conflict):
        s.submit(request("1"))
    assert s.runtime.status().queued == 2 and s.runtime.status().rows_busy == 1
    go.set()
    for h in heard:
        assert h.wait().finished


def test_cancelling_ends_running_and_waiting_requests_and_frees_everything(serve):
    s = serve({"a": 4}, rows=1)
    go, stopped = hold(s.engine)
    running = s.submit(request("running", max_tokens=50, adapters={"a": 1.0}))
    assert stopped.wait(20)
    waiting = s.submit(request("waiting", adapters={"a": 1.0}))
    assert s.runtime.cancel("running") and s.runtime.cancel("waiting")
    assert not s.runtime.cancel("nobody")
    go.set()
    for heard in (running, waiting):
        assert heard.wait().finished.reason is FinishReason.CANCELLED
    assert isinstance(waiting.events[0], Accepted)
    assert running.finished.usage.completion_tokens == len(running.tokens)
    status = s.runtime.status()
    assert (status.rows_busy, status.queued) == (0, 0)
    assert s.runtime.adapters.info("a").leases == 0
    assert not s.runtime.cancel("running")


def test_an_id_may_be_used_again_the_moment_its_last_event_is_heard(serve):
    s = serve(rows=2)
    r, heard, done = request("same", max_tokens=3), [], threading.Event()

    def again(event):
        heard.append(event)
        if isinstance(event, Finished):
            if sum(isinstance(e, Finished) for e in heard) == 50:
                done.set()
            else:
                s.runtime.submit(r, again)

    s.runtime.submit(r, again)
    assert done.wait(20)
    tokens = [t for e in heard if isinstance(e, Delta) for t in e.token_ids]
    assert tuple(tokens) == s.solo(r) * 50


def test_cancelling_and_resubmitting_an_id_from_many_threads_loses_nothing(serve):
    s = serve(rows=2)
    ended = [0] * 4

    def client(k):
        for _ in range(40):
            heard = s.submit(request(f"{k}", max_tokens=5))
            s.runtime.cancel(f"{k}")
            heard.wait()
            ended[k] += 1

    threads = [threading.Thread(target=client, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    assert ended == [40] * 4 and s.runtime.drain(20)
    assert s.runtime.metrics()["requests"] == 160


def test_a_deadline_ends_a_request_wherever_it_is(serve):
    times = {"now": 0.0}
    s = serve(rows=1, clock=lambda: times["now"])
    go, stopped = hold(s.engine)
    running = s.submit(request("running", max_tokens=50, deadline_s=5.0))
    assert stopped.wait(20)
    waiting = s.submit(request("waiting", deadline_s=5.0))
    times["now"] = 6.0
    go.set()
    for heard in (running, waiting):
        assert isinstance(heard.wait().error, DeadlineExceeded)
    assert s.runtime.metrics()["failures"] == 2


def test_an_engine_fault_ends_its_requests_and_the_next_ones_are_served(serve):
    s = serve({"a": 4})
    go, stopped = hold(s.engine)
    first = s.submit(request("first", adapters={"a": 1.0}))
    assert stopped.wait(20)
    s.engine.before_step = lambda: None
    s.engine.faults.append(fault("cuda said no"))
    go.set()
    assert isinstance(first.wait().error, EngineFault)
    assert s.runtime.adapters.info("a").leases == 0
    again = request("first", adapters={"a": 1.0})
    assert s.submit(again).wait().tokens == s.solo(again)
    assert s.runtime.status().requests_failed == 1
    assert s.runtime.status().state is RuntimeState.SERVING


def test_a_fault_while_decoding_ends_the_whole_batch_and_nothing_waiting(serve):
    s = serve(rows=2)
    go, stopped = hold(s.engine)
    heard = [s.submit(request(f"{i}", max_tokens=30)) for i in range(3)]
    assert stopped.wait(20)

    def break_a_full_batch():
        if not broken and s.engine.calls.decodes and len(s.engine.calls.decodes[-1]) == 2:
            broken.append(True)
            raise fault()

    broken = []
    s.engine.before_step = break_a_full_batch
    go.set()
    ends = [type(h.wait().events[-1]).__name__ for h in heard]
    assert sorted(ends[:2]) == ["Failed", "Failed"] and ends[2] == "Finished"


def test_a_bug_in_the_step_thread_ends_every_request_and_shows_in_the_status(serve, monkeypatch):
    caught = []
    monkeypatch.setattr(threading, "excepthook", lambda args: caught.append(args.exc_type))
    s = serve(rows=1)
    go, stopped = hold(s.engine)
    heard = [s.submit(request(f"{i}")) for i in range(2)]
    assert stopped.wait(20)
    s.engine.before_step = lambda: None
    s.engine.faults.append(ZeroDivisionError())
    go.set()
    for h in heard:
        assert isinstance(h.wait().error, EngineFault)
    s.runtime.close()
    assert caught == [ZeroDivisionError]
    with pytest.raises(Unavailable):
        s.submit(request("late"))


def test_a_listener_that_is_gone_ends_only_its_own_request(serve):
    s = serve(rows=2)

    def closed_loop(event):
        raise RuntimeError("Event loop is closed")

    s.runtime.submit(request("gone", max_tokens=60), closed_loop)
    r = request("a", (9, 9), 10)
    assert s.submit(r).wait().tokens == s.solo(r)
    assert s.runtime.drain(20)
    assert s.runtime.metrics()["tokens"] < 40


def test_draining_admits_nothing_and_waits_for_what_runs(serve):
    s = serve()
    go, stopped = hold(s.engine)
    heard = s.submit(request("a"))
    assert stopped.wait(20)
    assert not s.runtime.drain(0)
    assert s.runtime.status().state is RuntimeState.DRAINING
    with pytest.raises(Unavailable, match="draining"):
        s.submit(request("b"))
    go.set()
    assert s.runtime.drain(20) and heard.wait().finished


def test_closing_ends_what_is_left_and_closes_the_engine_once(serve):
    s = serve({"a": 4}, rows=1)
    go, stopped = hold(s.engine)
    heard = [s.submit(request(f"{i}", max_tokens=60)) for i in range(2)]
    assert stopped.wait(20)
    closing = threading.Thread(target=s.runtime.close)
    closing.start()
    s.engine.before_step = lambda: None
    go.set()
    closing.join(20)
    for h in heard:
        assert isinstance(h.wait().error, Unavailable)
    assert s.engine.closed
    s.runtime.close()
    with pytest.raises(Unavailable):
        s.submit(request("late"))
    with pytest.raises(Unavailable):
        s.runtime.adapters.load("a")


def test_defaults_come_from_request_then_release_then_bundle(serve):
    bundle = GenerationDefaults(SamplingDefaults(0.9, 7, 0.8, 33), ("beams are not implemented",))
    s = serve(sampling=SamplingDefaults(temperature=0.5), generation=bundle)
    assert s.runtime.sampling() == SamplingParams(0.5, 7, 0.8, None)
    assert s.runtime.sampling(SamplingOverrides(0.0, seed=3)) == SamplingParams(0.0, 7, 0.8, 3)
    assert s.runtime.stopping().max_tokens == 33
    assert s.runtime.stopping(StoppingOverrides(5, ignore_eos=True)).max_tokens == 5
    s.runtime.set_sampling_defaults(SamplingDefaults(max_tokens=2))
    assert s.runtime.stopping().max_tokens == 2
    assert s.runtime.status().warnings == ("beams are not implemented",)


def test_status_and_metrics_tell_what_happened(serve):
    s = serve({"a": 4})
    s.submit(request("1", max_tokens=6, adapters={"a": 1.0})).wait()
    s.submit(request("2", max_tokens=6, adapters={"a": 1.0})).wait()
    assert s.runtime.drain(20)
    status, metrics = s.runtime.status(), s.runtime.metrics()
    assert (status.backend, status.rows, status.context_tokens) == ("reference", 4, 64)
    assert (status.requests_served, status.tokens_generated) == (2, 12)
    assert status.heartbeat_age_s < 60
    assert (metrics["adapter_loads"], metrics["adapter_hits"]) == (1, 1)
    assert metrics["tokens_per_s"] > 0 and metrics["inter_token_s"] > 0 < metrics["ttft_s"]
    assert metrics["last_swap_s"] > 0 < metrics["scheduler_step_s"]


def test_who_gets_a_row_while_the_status_is_read_is_not_missed(monkeypatch):
    """A switch that waits until nothing runs would close the model under it."""
    engine, bundle = ReferenceEngine(vocab=VOCAB), make_bundle()
    with manual_runtime(engine, bundle, AdapterDirectory(bundle)) as (runtime, _, _):
        queued, admitting = Scheduler.queued.fget, []

        def read(scheduler):
            admitting.append(threading.Thread(target=runtime._stepper._admit))
            admitting[-1].start()
            admitting[-1].join(0.2)
            return queued(scheduler)

        monkeypatch.setattr(Scheduler, "queued", property(read))
        runtime.submit(request("r"), Listener())
        status = runtime.status()
        admitting[-1].join()
        assert (status.rows_busy, status.queued) in ((1, 0), (0, 1))


def test_times_of_an_answer_add_up(serve):
    s = serve()
    heard = s.submit(request("a")).wait()
    t = heard.finished.timings
    assert min(t.queue_s, t.prefill_s, t.decode_s) >= 0
    assert t.time_to_first_token_s == pytest.approx(t.queue_s + t.prefill_s)


def test_several_requests_are_queued_all_or_none(serve):
    s = serve(rows=1, options=RuntimeOptions(max_waiting=8))
    go, stopped = hold(s.engine)
    running = s.submit(request("running"))
    assert stopped.wait(20)
    kept = [Listener() for _ in range(3)]
    s.runtime.submit_all([(request(f"k{i}"), heard) for i, heard in enumerate(kept)])
    refused = [Listener() for _ in range(9)]
    with pytest.raises(Exhausted):
        s.runtime.submit_all([(request(f"r{i}"), heard) for i, heard in enumerate(refused)])
    with pytest.raises(Conflict):
        s.runtime.submit_all([(request("new"), Listener()), (request("k1"), Listener())])
    s.submit(request("one more"))
    go.set()
    for heard in (running, *kept):
        assert heard.wait().finished.reason is FinishReason.LENGTH
    assert not any(heard.events for heard in refused)
    assert s.submit(request("r0")).wait().tokens == s.solo(request("r0"))


def test_a_seed_gives_one_answer_in_every_mix_of_requests_with_every_option(serve):
    asked = SamplingParams(
        1.2,
        top_k=100,
        top_p=0.95,
        seed=11,
        min_p=0.001,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias=((5, 2.0), (9, -3.0)),
    )
    mine = request("mine", (3, 1, 4), 30, {"a": 1.0}, asked, min_tokens=4)
    alone = serve({"a": 4, "b": 4}).submit(mine).wait().tokens
    for others in (1, 3, 9):
        s = serve({"a": 4, "b": 4}, rows=4, options=RuntimeOptions(prefill_chunk=2))
        crowd = [
            request(f"o{i}", (i, 2, 5, 7), 20, {"ab"[i % 2]: 0.5}, SamplingParams(1.0, seed=i))
            for i in range(others)
        ]
        heard = [s.submit(r) for r in crowd[: others // 2]]
        middle = s.submit(mine)
        heard += [s.submit(r) for r in crowd[others // 2 :]]
        assert middle.wait().tokens == alone
        assert all(h.wait().finished for h in heard)
