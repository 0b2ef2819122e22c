"""Every history of a model with a shadow: people's requests, adapters that leave and come, releases
that declare something else, the end. Each comparison ends once, nobody's answer is another, and
nothing is held in the end."""

from __future__ import annotations

import functools
import itertools
import math
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remora_agent.bank.directory import AdapterDirectory, Declared
from remora_agent.hosting.names import check_shadows
from remora_agent.runtime.adapters import UnloadMode
from remora_agent.runtime.api import AdapterRef, Delta, Finished, FinishReason, Scoring
from remora_agent.runtime.model_runtime import ModelRuntime
from remora_agent.runtime.options import RuntimeOptions
from remora_agent.serving.call import (
    GenerateCall,
    SamplingOverrides,
    StoppingOverrides,
    TokenPrompt,
)
from remora_agent.serving.experiment_counts import ExperimentCounts
from remora_agent.serving.served_model import ServedModel
from remora_agent.serving.shadow import MAX_TASKS
from remora_contract.errors import Unsupported
from remora_contract.experiments import SHADOW_COUNTS, Arm, Experiment, Shadow
from tests.support.reference_engine import ReferenceEngine
from tests.support.runtime import VOCAB, Listener, add_adapter, byte_text, make_bundle

CONTEXT, ROWS, RANK = 64, 2, 4
ENDS = ("compared", "skipped", "cancelled", "failed")


@functools.cache
def folder() -> Path:
    kept = tempfile.TemporaryDirectory()
    made = Path(kept.name)
    folder.kept = kept  # until the process ends
    return made


class World:
    """A model with the adapters a and b; `bank` columns for them."""

    def __init__(self, bank: int = 2 * RANK, rows: int = ROWS, invocation: tuple[int, ...] = ()):
        bundle = make_bundle(CONTEXT, bank)
        self.directory = AdapterDirectory(bundle)
        for seed, name in enumerate("ab"):
            path = Path(tempfile.mkdtemp(dir=folder())) / name
            add_adapter(
                self.directory,
                bundle,
                path,
                name,
                "r1",
                seed=seed,
                r=RANK,
                invocation_tokens=invocation if name == "a" else (),
            )
        self.digests = {n: self.directory.resolve(n, None).digest for n in "ab"}
        self.engine = ReferenceEngine(rows, CONTEXT, VOCAB, bank)
        options = RuntimeOptions(spare_after_s=0.0)
        self.runtime = ModelRuntime(self.engine, bundle, byte_text(), self.directory, options)
        self.counts = ExperimentCounts()
        self.model = ServedModel(self.runtime, experiments=self.counts)
        self.declared: list[Declared] = []
        self.asked: list[tuple[Listener, tuple[int, ...], float]] = []
        self.numbers = itertools.count()

    def declare(self, *shadows: tuple[str, str, float]) -> None:
        """An experiment x whose incumbent and candidate are these adapters."""
        found = [self.declaring(*s) for s in shadows]
        self.declared += found
        with self.model.changing_names():
            self.directory.set_experiments(found)

    def declaring(self, incumbent: str, candidate: str, percent: float) -> Declared:
        arms = (Arm("i", 100, adapter=incumbent), Arm("c", 0, adapter=candidate))
        made = Experiment("x", arms, shadow=Shadow("i", "c", percent))
        mixes = {"i": ((self.digests[incumbent], 1.0),), "c": ((self.digests[candidate], 1.0),)}
        return Declared(made, {"i": incumbent, "c": f"{incumbent}{candidate}"}, mixes)

    def ask(self, name: str, prompt: tuple[int, ...], count: int, temperature: float) -> Listener:
        listener = Listener()
        call = GenerateCall(
            TokenPrompt(prompt),
            (AdapterRef(name),) if name else (),
            SamplingOverrides(temperature=temperature),
            StoppingOverrides(max_tokens=count, ignore_eos=True),
            scoring=Scoring(top=0),
        )
        self.model.submit(f"r{next(self.numbers)}", call, prompt, None, listener)
        self.asked.append((listener, prompt, temperature))
        return listener

    def quiet(self) -> None:
        """Then nobody but a shadow may be in the way."""
        for listener, *_ in self.asked:
            listener.wait()

    def told(self) -> dict[str, float]:
        """Of all that was ever declared."""
        told = {}
        for one in self.declared:
            told |= self.counts.metrics([one])
        return {
            name: sum(v for n, v in told.items() if n.startswith(f"shadow_{name}."))
            for name in SHADOW_COUNTS
        }

    def settled(self, offered: int) -> dict[str, float]:
        for _ in range(2000):
            told = self.told()
            if told["offered"] == offered == sum(told[n] for n in ENDS):
                return told
            threading.Event().wait(0.002)
        raise AssertionError(told)

    def close(self) -> None:
        self.runtime.drain(10.0)
        self.runtime.close()

    def check(self) -> None:
        """Once all has ended."""
        told = self.told()
        assert told["offered"] == sum(told[n] for n in ENDS), told
        assert told["failed"] == 0
        assert told["exact"] <= told["compared"]
        assert told["prefix_tokens"] <= told["answer_tokens"]
        assert told["agreed_tokens"] <= told["scored_tokens"] <= told["answer_tokens"]
        assert self.runtime._bank.snapshot.leases == 0
        assert self.engine.closed and not self.engine._adapters
        for listener, prompt, temperature in self.asked:
            end = listener.wait().finished
            mix = {a.digest: a.weight for a in end.provenance.adapters}
            alone = self.engine.solo(prompt, 60, mix)
            assert temperature or listener.tokens == alone[: len(listener.tokens)]
            if end.reason is not FinishReason.CANCELLED:
                assert len(listener.tokens) == end.usage.completion_tokens


@pytest.fixture
def world():
    made = World()
    yield made
    made.close()
    made.check()


ASK = st.tuples(
    st.just("ask"),
    st.sampled_from(["x", "x", "x", "a", "b", ""]),
    st.integers(1, 30),
    st.integers(1, 20),
    st.sampled_from([0.0, 0.0, 1.5]),
)
ACTIONS = st.lists(
    ASK
    | ASK
    | st.tuples(st.just("settle"))
    | st.tuples(st.just("pause"), st.floats(0.0, 0.004))
    | st.tuples(st.just("unload"), st.sampled_from("ab"), st.sampled_from(UnloadMode))
    | st.tuples(st.just("load"), st.sampled_from("ab"))
    | st.tuples(
        st.just("declare"),
        st.sampled_from("ab"),
        st.sampled_from("ab"),
        st.sampled_from([30.0, 100.0]),
    )
    | st.tuples(st.just("nothing declared")),
    max_size=14,
)


@settings(max_examples=40, deadline=None)
@given(ACTIONS, st.sampled_from([RANK, 2 * RANK]))
def test_whatever_happens_each_comparison_ends_once_and_nothing_is_held(actions, bank):
    world = World(bank)
    world.declare(("a", "b", 100.0))
    for action, *how in actions:
        play(world, action, how)
    world.close()
    world.check()


def play(world: World, action: str, how: list) -> None:
    if action == "ask":
        name, length, count, temperature = how
        if name != "x" or world.directory.experiment("x"):
            world.ask(name, tuple(range(1, length + 1)), count, temperature)
    elif action == "settle":
        world.quiet()
    elif action == "pause":
        threading.Event().wait(*how)
    elif action == "unload":
        name, mode = how
        world.quiet()
        assert not world.runtime.adapters.unload(name, None, mode).draining
    elif action == "load":
        world.quiet()
        assert world.runtime.adapters.load(*how).bank_bytes
    else:
        world.declare(*([tuple(how)] if how else []))


def test_a_queue_of_comparisons_drops_the_oldest(world):
    """Ten answers end at once: while they do, nothing is spare."""
    world.declare(("a", "a", 100.0))
    gate = threading.Event()
    world.engine.before_step = gate.wait
    listeners = [world.ask("x", (1, 2, i), 5, 0.0) for i in range(10)]
    gate.set()
    for listener in listeners:
        listener.wait()
    told = world.settled(10)
    assert (told["compared"], told["skipped"]) == (MAX_TASKS, 10 - MAX_TASKS)
    assert told["exact"] == told["compared"]


def test_an_activated_adapter_is_invoked_by_the_prompt_alone():
    """Its answer holds the invocation again: scored as part of the prompt, the adapter would act
    from there on only."""
    for token in range(1, 200):
        world = World(invocation=(token,))
        world.declare(("a", "a", 100.0))
        prompt = (7, token, 8)
        listener = world.ask("x", prompt, 30, 0.0).wait()
        told = world.settled(1)
        world.close()
        scores = [s for e in listener.events if isinstance(e, Delta) for s in e.logprobs]
        assert len(scores) == told["scored_tokens"] == 30
        assert told["incumbent_nll"] == pytest.approx(-sum(s.logprob for s in scores))
        if token in listener.tokens[:20]:
            return
    raise AssertionError("no answer held its invocation")


def test_a_name_that_somebody_moved_is_compared_no_more(world):
    """What answers is not what the release says of the arm."""
    world.declare(("a", "b", 100.0))
    bundle = world.runtime.bundle
    path = Path(tempfile.mkdtemp(dir=folder())) / "a2"
    add_adapter(world.directory, bundle, path, "a", "r2", seed=9, r=RANK)
    world.directory.set_alias("a", "r2")
    world.ask("x", (1, 2, 3), 5, 0.0).wait()
    assert world.settled(1)["skipped"] == 1


def test_no_share_of_the_rows_and_no_metric_of_anybody_hears_of_a_shadow(world):
    world.runtime.adapters.load("a")
    world.runtime.adapters.load("b")
    world.declare(("a", "b", 100.0))
    before = world.runtime.metrics()
    for i in range(3):
        world.ask("x", (1, 2, i), 5, 0.0).wait()
        told = world.settled(i + 1)
    assert told["compared"] == 3
    after = world.runtime.metrics()
    grown = {n: after[n] - before[n] for n in after if n not in RECENT and after[n] != before[n]}
    assert grown == {"requests": 3, "tokens": 15, "adapter_hits": 3, "prefix_lookups": 3}
    status = world.runtime.status()
    assert (status.requests_served, status.tokens_generated) == (3, 15)


# Of the last requests and steps, which are people's alone; test_spare.py.
RECENT = {"ttft_s", "ttft_p95_s", "inter_token_s", "tokens_per_s", "scheduler_step_s"}


def test_an_engine_that_scores_nothing_is_refused_by_name():
    bundle = make_bundle(CONTEXT, RANK)
    engine = ReferenceEngine(ROWS, CONTEXT, VOCAB, RANK, scored=0)
    runtime = ModelRuntime(engine, bundle, byte_text(), AdapterDirectory(bundle))
    arms = (Arm("i", 100, adapter="a"), Arm("c", 0, adapter="b"))
    plain, shadowed = (Experiment("x", arms, shadow=s) for s in (None, Shadow("i", "c", 5)))
    check_shadows(SimpleNamespace(release_id="r", experiments=(plain,)), runtime)
    with pytest.raises(Unsupported, match=r"experiment x of r: a shadow .* reference engine"):
        check_shadows(SimpleNamespace(release_id="r", experiments=(shadowed,)), runtime)
    runtime.close()


def test_the_numbers_are_those_of_the_engine_alone(world):
    """Token by token, with the engine's own logits."""
    world.runtime.adapters.load("b")
    world.declare(("a", "b", 100.0))
    prompt, count = (3, 1, 4), 9
    world.ask("x", prompt, count, 0.0).wait()
    told = world.settled(1)
    a, b = ({world.digests[n]: 1.0} for n in "ab")
    answer, rival = (world.engine.solo(prompt, count, mix) for mix in (a, b))
    common = next((i for i, (p, q) in enumerate(zip(answer, rival, strict=True)) if p != q), count)
    agreed = sum(
        world.engine.solo((*prompt, *answer[:i]), 1, b) == (token,)
        for i, token in enumerate(answer)
    )
    assert (told["compared"], told["answer_tokens"]) == (1, count)
    assert (told["prefix_tokens"], told["exact"]) == (common, answer == rival)
    assert (told["scored_tokens"], told["agreed_tokens"]) == (count, agreed)
    assert told["incumbent_nll"] < told["candidate_nll"] < math.inf


def test_a_cancelled_answer_is_not_offered(world):
    world.declare(("a", "a", 100.0))
    listener = world.ask("x", (1, 2), 40, 0.0)
    listener.wait_tokens(1)
    world.model.cancel("r0")
    end = listener.wait().finished
    assert isinstance(end, Finished)
    if end.reason is FinishReason.CANCELLED:
        assert world.told()["offered"] == 0
