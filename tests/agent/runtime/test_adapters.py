"""Operating adapters while the model serves."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from remora_agent.bank.weights import load_weights
from remora_agent.runtime.adapters import Tier, UnloadMode
from remora_agent.runtime.api import AdapterRef, FinishReason
from remora_agent.runtime.options import RuntimeOptions
from remora_contract.adapter import WEIGHTS_FILE
from remora_contract.errors import (
    AdapterInvalid,
    ArtifactInvalid,
    Conflict,
    Exhausted,
    NotFound,
    Refused,
    RequestInvalid,
)
from tests.support.runtime import add_adapter, make_bundle, request


def start(s, name, adapter, max_tokens=60):
    """A request that is decoding; its engine goes on only with `go`."""
    go, stopped = threading.Event(), threading.Event()

    def wait():
        stopped.set()
        assert go.wait(20)

    s.engine.before_step = wait
    heard = s.submit(request(name, max_tokens=max_tokens, adapters={adapter: 1.0}))
    assert stopped.wait(20)
    return heard, go


def second_revision(s, tmp_path, name="a", seed=77, r=4):
    directory = s.runtime.adapters.directory
    return add_adapter(directory, s.bundle, tmp_path / f"new-{seed}", name, "r2", seed=seed, r=r)


def test_a_swap_leaves_running_requests_on_the_old_bytes_and_gives_new_ones_the_new(
    serve, tmp_path
):
    s = serve({"a": 4})
    new = second_revision(s, tmp_path)
    old_request = request("old", max_tokens=60, adapters={"a": 1.0})
    heard, go = start(s, "old", "a")
    epoch = s.runtime.adapters.directory.alias("a").epoch
    s.runtime.adapters.set_alias("a", "r2", expected_epoch=epoch)
    with pytest.raises(Conflict):
        s.runtime.adapters.set_alias("a", "r1", expected_epoch=epoch)
    after = s.submit(request("new", max_tokens=8, adapters={"a": 1.0}))
    s.engine.before_step = lambda: None
    go.set()
    assert heard.wait().tokens == s.solo(old_request)
    assert heard.finished.provenance.adapters[0].digest == s.digests["a"]
    assert after.wait().finished.provenance.adapters[0].digest == new.digest
    assert after.tokens == s.engine.solo((1, 2, 3), 8, {new.digest: 1.0})


def test_swapping_under_load_fails_nothing_and_every_answer_has_one_digest(serve, tmp_path):
    s = serve({"a": 8}, rows=3)
    new = second_revision(s, tmp_path, r=8)
    by_digest = {d: s.engine.solo((1, 2, 3), 20, {d: 1.0}) for d in (s.digests["a"], new.digest)}
    heard = []
    for i in range(60):
        heard.append(s.submit(request(f"{i}", max_tokens=20, adapters={"a": 1.0})))
        if i % 7 == 3:
            s.runtime.adapters.set_alias("a", ("r2", "r1")[i % 2])
    used = set()
    for h in heard:
        (answered,) = h.wait().finished.provenance.adapters
        assert h.tokens == by_digest[answered.digest]
        used.add(answered.digest)
    assert used == set(by_digest)


def test_an_explicit_revision_wins_over_the_alias(serve, tmp_path):
    s = serve({"a": 4})
    new = second_revision(s, tmp_path)
    r = request("x", max_tokens=4)
    r = type(r)(**{**vars(r), "adapters": (AdapterRef("a", "r2"),)})
    assert s.submit(r).wait().finished.provenance.adapters[0].digest == new.digest


def test_loading_brings_an_adapter_into_the_bank_before_its_first_request(serve):
    s = serve({"a": 4, "b": 4})
    assert s.runtime.adapters.info("a").tier is Tier.DISK
    loaded = s.runtime.adapters.load("a")
    assert loaded.tier is Tier.BANK and loaded.bank_bytes > 0 and loaded.alias_target
    assert s.runtime.adapters.load("a") == loaded
    s.submit(request("1", adapters={"a": 1.0})).wait()
    assert s.runtime.metrics()["adapter_hits"] >= 1
    assert [i.tier for i in s.runtime.adapters.list()] == [Tier.BANK, Tier.DISK]
    with pytest.raises(NotFound):
        s.runtime.adapters.load("nobody")


def test_loading_reads_the_file_while_the_engine_is_in_a_step(serve):
    """Or a swap would wait for one step more."""
    bundle, read = make_bundle(), threading.Event()

    def watched(directory):
        read.set()
        return load_weights(directory, bundle)

    s = serve({"a": 4}, load=watched)
    heard = Future()

    def during_the_step():
        s.engine.before_step = lambda: None
        loading = pool.submit(s.runtime.adapters.load, "a")
        heard.set_result((read.wait(10), loading.done(), loading))

    with ThreadPoolExecutor(1) as pool:
        s.engine.before_step = during_the_step
        s.submit(request("base", max_tokens=3)).wait()
        was_read, done, loading = heard.result(timeout=20)
        assert was_read and not done
        assert loading.result(timeout=20).tier is Tier.BANK
    assert s.runtime.metrics()["adapter_reads"] == 1


def test_loading_what_running_requests_leave_no_room_for_is_refused(serve):
    s = serve({"a": 12, "b": 12}, context=4096)
    refused = threading.Event()
    s.engine.before_step = lambda: refused.wait(0.001)
    heard = s.submit(request("x", max_tokens=4000, adapters={"a": 1.0}))
    heard.wait_tokens(1)
    with pytest.raises(Exhausted, match="does not fit"):
        s.runtime.adapters.load("b")
    refused.set()
    assert s.runtime.adapters.info("b").tier is Tier.HOST
    s.runtime.cancel("x")
    assert heard.wait().finished.reason is FinishReason.CANCELLED


def test_a_pinned_adapter_is_never_evicted(serve):
    s = serve({"a": 8, "b": 8, "c": 8})
    assert s.runtime.adapters.pin("a").pinned
    for i, name in enumerate("bcbcbc"):
        s.submit(request(f"{i}", adapters={name: 1.0})).wait()
    assert s.runtime.adapters.info("a").tier is Tier.BANK
    assert s.digests["a"] not in s.engine.calls.removes
    with pytest.raises(Refused, match="unpin"):
        s.runtime.adapters.pin("b")
    with pytest.raises(Refused, match="pinned"):
        s.runtime.adapters.unload("a")
    assert not s.runtime.adapters.pin("a", pinned=False).pinned
    assert s.runtime.adapters.unload("a").tier is Tier.DISK


def test_capacity_tells_how_many_more_fit(serve):
    s = serve({"a": 8, "b": 8})
    assert s.runtime.adapters.capacity(4).more_adapters == 4
    s.runtime.adapters.load("a")
    found = s.runtime.adapters.capacity(4)
    assert (found.limits.rank, found.used.rank, found.evictable_rank) == (16, 8, 8)
    assert found.used.bytes == s.runtime.adapters.info("a").bank_bytes
    assert 0 < found.host_used_bytes < found.host_max_bytes == RuntimeOptions().host_bytes
    s.runtime.adapters.pin("a")
    assert s.runtime.adapters.capacity(4).more_adapters == 2
    with pytest.raises(RequestInvalid):
        s.runtime.adapters.capacity(0)


def test_a_graceful_unload_lets_running_requests_end_and_new_ones_load_it_again(serve):
    s = serve({"a": 4})
    heard, go = start(s, "old", "a", max_tokens=30)
    calls = []
    unloading = threading.Thread(target=lambda: calls.append(s.runtime.adapters.unload("a")))
    unloading.start()
    s.engine.before_step = lambda: unloading.join(20) if s.engine.calls.decodes else None
    go.set()
    assert heard.wait().finished.reason is FinishReason.LENGTH
    assert calls[0].draining and calls[0].leases == 1
    assert s.runtime.adapters.info("a").tier is Tier.DISK
    again = request("new", adapters={"a": 1.0})
    assert s.submit(again).wait().tokens == s.solo(again)
    assert s.engine.calls.adds == [s.digests["a"]] * 2


def test_an_unload_may_cancel_its_requests_and_forget_the_adapter(serve):
    s = serve({"a": 4}, rows=1)
    heard, go = start(s, "running", "a")
    waiting = s.submit(request("waiting", adapters={"a": 1.0}))
    other = s.submit(request("other"))
    unloading = threading.Thread(
        target=lambda: s.runtime.adapters.unload("a", mode=UnloadMode.CANCEL, forget=True)
    )
    unloading.start()
    s.engine.before_step = lambda: unloading.join(20) if s.engine.calls.decodes else None
    go.set()
    for h in (heard, waiting):
        assert h.wait().finished.reason is FinishReason.CANCELLED
    assert other.wait().finished.reason is FinishReason.LENGTH
    assert s.engine.calls.removes == [s.digests["a"]]
    with pytest.raises(NotFound):
        s.submit(request("late", adapters={"a": 1.0}))


def test_a_busy_adapter_is_not_unloaded_when_that_was_asked(serve):
    s = serve({"a": 4})
    heard, go = start(s, "x", "a", max_tokens=30)
    caught = []

    def unload():
        try:
            s.runtime.adapters.unload("a", mode=UnloadMode.REFUSE_IF_BUSY, forget=True)
        except Refused as e:
            caught.append(str(e))

    unloading = threading.Thread(target=unload)
    unloading.start()
    s.engine.before_step = lambda: unloading.join(20) if s.engine.calls.decodes else None
    go.set()
    heard.wait()
    assert "used by 1" in caught[0] and s.runtime.adapters.directory.resolve("a")


def test_a_damaged_adapter_fails_its_requests_and_no_others(serve):
    s = serve({"a": 4, "b": 4})
    path = s.runtime.adapters.directory.resolve("a").directory / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")
    good = request("good", adapters={"b": 1.0})
    heard = s.submit(request("bad", adapters={"a": 1.0, "b": 1.0})), s.submit(good)
    assert isinstance(heard[0].wait().error, ArtifactInvalid)
    assert heard[1].wait().tokens == s.solo(good)
    with pytest.raises(ArtifactInvalid):
        s.runtime.adapters.load("a")
    assert all(i.leases == 0 for i in s.runtime.adapters.list())


def test_a_request_for_a_large_adapter_is_not_starved_by_small_ones(serve):
    s = serve({"small": 4, "large": 16}, rows=4, options=RuntimeOptions(patience_s=0.001))
    stop, answered = threading.Event(), []

    def flood(k):
        i = 0
        while not stop.is_set():
            heard = s.submit(request(f"s{k}-{i}", max_tokens=3, adapters={"small": 1.0})).wait()
            answered.append(heard.finished)
            i += 1

    threads = [threading.Thread(target=flood, args=(k,)) for k in range(3)]
    for t in threads:
        t.start()
    large = request("large", adapters={"large": 1.0})
    heard = s.submit(large)
    try:
        assert heard.wait().tokens == s.solo(large)
    finally:
        stop.set()
        for t in threads:
            t.join(20)
    assert answered


def test_registering_may_move_the_alias_at_once(serve, tmp_path):
    s = serve({"a": 4, "b": 4})
    other = s.runtime.adapters.directory.resolve("b").directory
    info = s.runtime.adapters.register("a", "r9", other, set_alias=True)
    assert info.alias_target and info.digest == s.digests["b"]
    assert s.runtime.adapters.directory.alias("a").revision == "r9"


def replace_weights(s, name, data):
    """Overwrites the file in place, as a careless copy does."""
    path = s.runtime.adapters.directory.resolve(name).directory / WEIGHTS_FILE
    before = path.read_bytes()
    path.write_bytes(data(before))
    return path, before


def test_files_replaced_while_loaded_change_no_answer_and_are_refused_when_read_again(serve):
    s = serve({"a": 4, "b": 4})
    asked = request("1", adapters={"a": 1.0})
    assert s.submit(asked).wait().tokens == s.solo(asked)
    path, good = replace_weights(s, "a", lambda data: data[:-4] + b"\x00\x00\x80\x3f")
    again = request("2", adapters={"a": 1.0})
    assert s.submit(again).wait().tokens == s.solo(again)
    s.runtime.adapters.unload("a")
    for name in ("3", "4"):
        refused = s.submit(request(name, adapters={"a": 1.0})).wait().error
        assert isinstance(refused, ArtifactInvalid)
        assert str(path) in str(refused) and "digest" in str(refused)
    assert s.runtime.metrics()["adapter_read_failures"] == 2
    path.write_bytes(good)
    healed = request("5", adapters={"a": 1.0})
    assert s.submit(healed).wait().tokens == s.solo(healed)


def test_another_adapter_put_in_its_place_is_never_served_under_the_old_digest(serve):
    s = serve({"a": 4, "b": 4})
    here = s.runtime.adapters.directory.resolve("a").directory
    other = s.runtime.adapters.directory.resolve("b").directory
    for file in other.iterdir():
        (here / file.name).write_bytes(file.read_bytes())
    refused = s.submit(request("1", adapters={"a": 1.0})).wait().error
    assert isinstance(refused, ArtifactInvalid)
    assert str(here) in str(refused) and "new revision" in str(refused)
    assert not s.engine.calls.adds


def test_an_adapter_that_the_engine_refuses_evicts_others_once_and_not_at_every_request(serve):
    s = serve({"good": 8, "bad": 16})
    add, tried = s.engine.add_adapter, []

    def refuse_bad(weights):
        if weights.digest == s.digests["bad"]:
            tried.append(weights.digest)
            raise AdapterInvalid("the engine has no input for it")
        return add(weights)

    s.engine.add_adapter = refuse_bad
    s.submit(request("0", adapters={"good": 1.0})).wait()
    for i in range(3):
        heard = s.submit(request(f"b{i}", adapters={"bad": 1.0})).wait()
        assert isinstance(heard.error, AdapterInvalid)
        s.submit(request(f"g{i}", adapters={"good": 1.0})).wait()
    assert len(tried) == 1 and s.engine.calls.adds == [s.digests["good"]] * 2
    assert all(i.leases == 0 for i in s.runtime.adapters.list())


def test_the_bank_is_bounded_by_rank_and_bytes_below_what_the_engine_takes(serve):
    s = serve({"a": 4, "b": 4}, options=RuntimeOptions(bank_rank=6))
    for name in "ab":
        s.submit(request(name, adapters={name: 1.0})).wait()
    assert s.engine.calls.removes == [s.digests["a"]]
    assert s.runtime.adapters.capacity(2).limits.rank == 6
    one = s.runtime.adapters.info("b").bank_bytes
    s = serve({"a": 4, "b": 4}, options=RuntimeOptions(bank_bytes=2 * one - 1))
    for name in "ab":
        s.submit(request(name, adapters={name: 1.0})).wait()
    assert s.engine.calls.removes == [s.digests["a"]]
    with pytest.raises(Exhausted, match=f"bank holds rank 16 and {2 * one - 1} bytes"):
        s.submit(request("both", adapters={"a": 1.0, "b": 1.0}))


def test_swaps_and_tiers_are_counted(serve, tmp_path):
    s = serve({"a": 4})
    second_revision(s, tmp_path)
    s.submit(request("1", adapters={"a": 1.0})).wait()
    s.runtime.adapters.set_alias("a", "r2")
    s.submit(request("2", adapters={"a": 1.0})).wait()
    s.submit(request("3", adapters={"a": 1.0})).wait()
    m = s.runtime.metrics()
    assert (m["swaps"], m["adapter_reads"], m["adapter_loads"], m["adapter_hits"]) == (1, 2, 2, 1)
    assert m["adapter_read_s"] > 0 and m["adapter_load_s"] > 0
    assert (m["adapters_in_bank"], m["adapters_in_host"], m["bank_rank"]) == (2, 2, 8)
    assert m["adapter_host_bytes"] > 0 and m["bank_bytes"] > 0 and m["adapter_leases"] == 0
