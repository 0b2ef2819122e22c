"""A release that only changes adapters: names move together, no request fails."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from remora_agent.runtime.adapters import Adapters
from remora_contract.digests import digest_bytes
from remora_contract.errors import (
    ArtifactInvalid,
    Incompatible,
    NotFound,
    RemoraError,
    RequestInvalid,
)
from remora_contract.release import ReleaseUseCase, SamplingDefaults, WeightedName
from tests.agent.host.load import OPTIONS
from tests.support.adapters import random_tensors, write_sidecar

BOTH = {"both": {"a": 1.0, "b": 1.0}}


def release(world, revision: str):
    return world.assignment(
        f"release-{revision}", adapters=[("a", revision), ("b", revision)], use_cases=BOTH
    )


def test_a_switch_of_adapters_begins_the_times_anew_and_goes_on_counting(hosted):
    hosted.host.switch(release(hosted.world, "r0"))
    hosted.client.generate("x", **OPTIONS)
    before = hosted.host.metrics()
    hosted.host.switch(release(hosted.world, "r1"))
    after = hosted.host.metrics()
    assert before["ttft_s"] > 0 == after["ttft_s"]
    assert after["requests"] == before["requests"]


def test_under_load_every_request_is_answered_by_one_release_whole(hosted):
    world, revisions = hosted.world, [f"r{i}" for i in range(6)]
    hosted.host.switch(release(world, revisions[0]))
    with hosted.load({"use_case": "both"}, {"adapter": "a"}, {"adapter": None}) as load:
        for revision in revisions[1:]:
            hosted.host.switch(release(world, revision))
            load.wait_answers(6)
    load.check(hosted.solo)
    digests = {world.adapter(n, r).digest: r for n in "ab" for r in revisions}
    seen = set()
    for _, choice, result in load.answers:
        # Never a from one release and b from another.
        releases = {digests[a.digest] for a in result.provenance.adapters}
        assert len(releases) == (0 if choice == {"adapter": None} else 1)
        seen |= releases
    assert seen == set(revisions)
    assert len(hosted.engines.opened) == 1


def test_after_the_switch_returned_only_the_new_bytes_answer(hosted):
    world = hosted.world
    for revision in ("r1", "r2", "r1", "r3"):
        hosted.host.switch(release(world, revision))
        result = hosted.client.generate("x", adapter="a", **OPTIONS)
        assert result.provenance.adapters[0].digest == world.adapter("a", revision).digest
        state = hosted.host.serving()
        assert state.release_id == f"release-{revision}"
        assert {(a.name, a.revision) for a in state.adapters} == {("a", revision), ("b", revision)}


def test_new_adapters_are_in_the_bank_before_their_first_request(hosted):
    hosted.host.switch(release(hosted.world, "r1"))
    hosted.host.switch(release(hosted.world, "r2"))
    tiers = {(a.name, a.revision): a.tier for a in hosted.client.adapters().adapters}
    assert tiers == {("a", "r2"): "bank", ("b", "r2"): "bank"}


def test_a_request_in_flight_ends_on_the_bytes_it_started_with(hosted):
    world = hosted.world
    hosted.host.switch(release(world, "r1"))
    hosted.engines.gate.clear()
    stream = hosted.client.stream("x", adapter="a", **OPTIONS)
    hosted.engines.gate.set()
    hosted.host.switch(release(world, "r2"))
    list(stream)
    assert stream.result.provenance.adapters[0].digest == world.adapter("a", "r1").digest
    assert stream.result.token_ids == hosted.solo("x", stream.result)


def test_what_a_release_no_longer_holds_is_gone(hosted):
    world = hosted.world
    hosted.host.switch(release(world, "r1"))
    hosted.host.switch(world.assignment("only-a", adapters=[("a", "r1")]))
    with pytest.raises(NotFound):
        hosted.client.generate("x", adapter="b")
    with pytest.raises(NotFound):
        hosted.client.generate("x", use_case="both")
    assert hosted.client.generate("x", adapter="a", **OPTIONS).text is not None


def test_sampling_defaults_come_with_the_release(hosted):
    world = hosted.world
    hosted.host.switch(world.assignment())
    short = replace(world.assignment("short"), sampling=SamplingDefaults(max_tokens=3))
    hosted.host.switch(short)
    assert len(hosted.client.generate("x", ignore_eos=True).token_ids) == 3


def foreign_adapter(world, tmp_path):
    """One that was converted for another base."""
    good = world.adapter("a", "r1")
    directory = tmp_path / "foreign"
    tensors = random_tensors(world.bundle("base").decoder, seed=5, r=2, projections=("q",))
    adapter = write_sidecar(directory, digest_bytes(b"another base"), tensors)
    return replace(good, name="foreign", digest=adapter.digest, directory=directory)


def test_a_refused_adapter_leaves_everything_as_it_was(hosted, tmp_path):
    world = hosted.world
    hosted.host.switch(release(world, "r1"))
    before = (hosted.client.adapters(), hosted.client.use_cases())
    wanted = release(world, "r2")
    foreign = replace(wanted, adapters=(*wanted.adapters, foreign_adapter(world, tmp_path)))
    tampered = replace(
        wanted, adapters=(replace(wanted.adapters[0], digest=digest_bytes(b"other bytes")),)
    )
    for assignment, error in ((foreign, Incompatible), (tampered, ArtifactInvalid)):
        with pytest.raises(error):
            hosted.host.switch(assignment)
        assert hosted.host.serving().release_id == "release-r1"
        after = (hosted.client.adapters(), hosted.client.use_cases())
        assert after[0].aliases == before[0].aliases
        assert {(a.name, a.revision) for a in after[0].adapters} == {("a", "r1"), ("b", "r1")}
        assert after[1] == before[1]


def test_adapters_that_do_not_fit_together_come_in_with_their_requests(hosted):
    world = hosted.world
    names = [f"wide{i}" for i in range(3)]
    for name in names:
        world.adapter(name, rank=30)  # 64 fit
    hosted.host.switch(world.assignment(adapters=[(n, "r1") for n in names]))
    for name in names:
        result = hosted.client.generate("x", adapter=name, **OPTIONS)
        assert result.token_ids == hosted.solo("x", result)


def test_a_bundle_that_is_not_what_the_assignment_says_is_refused(hosted):
    world = hosted.world
    wrong = replace(world.assignment(), bundle_digest=digest_bytes(b"other"))
    for ask in (hosted.host.switch, lambda a: hosted.host.build(a, lambda phase, done: None)):
        with pytest.raises(ArtifactInvalid, match="digest"):
            ask(wrong)
    assert hosted.host.serving() is None


def test_a_damaged_tokenizer_is_refused_and_the_old_release_serves_on(hosted):
    world = hosted.world
    hosted.host.switch(world.assignment())
    world.bundle("other")
    path = world.root / "b" / "other" / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace("a", "b", 1))
    with pytest.raises(RemoraError, match="tokenizer"):
        hosted.host.switch(world.assignment("two", bundle="other"))
    assert hosted.client.generate("x", **OPTIONS).text is not None


def test_a_request_that_comes_between_two_swapped_names_waits_for_both(hosted, monkeypatch):
    world = hosted.world
    hosted.host.switch(release(world, "r1"))
    swap, answers = Adapters.set_alias, []
    asker = threading.Thread(
        target=lambda: answers.append(hosted.client.generate("x", use_case="both", **OPTIONS))
    )

    def interrupted(self, name, revision, expected_epoch=None):
        alias = swap(self, name, revision, expected_epoch)
        if not asker.ident:
            asker.start()
            asker.join(0.3)  # ample for an answer, if nothing kept the request out
        return alias

    monkeypatch.setattr(Adapters, "set_alias", interrupted)
    hosted.host.switch(release(world, "r2"))
    asker.join()
    digests = {a.digest for a in answers[0].provenance.adapters}
    assert digests == {world.adapter(n, "r2").digest for n in "ab"}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"use_cases": (ReleaseUseCase("both", (WeightedName("a"), WeightedName("a"))),)}, "twice"),
        ({"use_cases": (ReleaseUseCase("both", (WeightedName("a", 1e4),)),)}, "weight"),
        ({"use_cases": (ReleaseUseCase("u", tuple(map(WeightedName, "abcdefghi"))),)}, "at most 8"),
        ({"sampling": SamplingDefaults(top_p=5.0)}, "top_p"),
        ({"sampling": SamplingDefaults(temperature=-1.0)}, "temperature"),
        ({"sampling": SamplingDefaults(max_tokens=0)}, "max_tokens"),
    ],
)
def test_a_release_nobody_could_ask_is_refused_and_no_name_has_moved(hosted, changes, why):
    hosted.host.switch(release(hosted.world, "r0"))
    with pytest.raises(RequestInvalid, match=why):
        hosted.host.switch(replace(release(hosted.world, "r1"), **changes))
    assert {a.revision for a in hosted.client.adapters().aliases} == {"r0"}
    assert {a.revision for a in hosted.client.adapters().adapters} == {"r0"}
    result = hosted.client.generate("x", use_case="both", **OPTIONS)
    assert {a.revision for a in result.provenance.adapters} == {"r0"}
    assert hosted.host.serving().release_id == "release-r0"
