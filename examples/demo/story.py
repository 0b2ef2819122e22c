"""The demo's steps in order: each says what it does, does it with the real programs, and checks it.

Owns the claims. How things run, look and are asked belongs to the other modules.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from examples.demo.account import Account, size
from examples.demo.asking import Survey, survey
from examples.demo.build import Artifact, Built, convert, export, publish
from examples.demo.cast import BASE, Cast
from examples.demo.fleet import Agent, Fleet
from examples.demo.processes import DemoFailed, Workshop
from examples.demo.traffic import Traffic, Verdict, judge

AGENTS = ("edge-1", "edge-2", "edge-3")
SOAK_S = 1.0
# What streams see before and after the swap, so that a difference would show.
CALM_S = 1.5


class Story:
    def __init__(self, shop: Workshop, account: Account, cast: Cast) -> None:
        self._shop = shop
        self._account = account
        self._cast = cast
        self._fleet = Fleet(shop)
        self._facts: list[tuple[str, str]] = []

    def tell(self) -> list[tuple[str, str]]:
        """Raises DemoFailed naming what was wrong; returns what to sum up."""
        steps = self._account.step
        with steps("One checkpoint becomes portable bundles, PEFT adapters become sidecars"):
            self._built = self._build()
        with steps("A controller, and three devices that join with one-time tokens"):
            self._start_fleet()
        with steps("The base model is rolled out in waves; each device builds its engine"):
            self._roll_out_base()
        with steps("Two adapters follow: the engine stays"):
            self._ship_adapters()
        with steps("A new revision of one adapter while clients stream"):
            self._swap_under_load()
        if self._cast.precision != "fp16":
            with steps("One device gets another precision; the adapters are the same"):
                self._change_precision()
        with steps("Telemetry"):
            self._telemetry()
        with steps("Everything ends when told to"):
            self._stop()
        return self._facts

    def _build(self) -> Built:
        bundles = export(self._shop, self._account, self._cast)
        adapters = convert(self._shop, self._account, self._cast)
        built = Built(bundles, adapters)
        for artifact in (*bundles.values(), *list(adapters.values())[:2]):
            publish(self._shop, artifact)
        return built

    def _start_fleet(self) -> None:
        self._fleet.init()
        self._fleet.serve()
        for name in AGENTS:
            self._fleet.join(name, f"name={name}", "site=demo")
        for agent in self._fleet.agents:
            self._fleet.await_listening(agent)
        self._quote("remora", "devices")

    def _roll_out_base(self) -> None:
        bundle = self._built.bundles[self._cast.precision]
        release = self._cast.model
        self._shop.run(
            "remora", "releases", "create", "--name", release, "--bundle", bundle.reference
        )
        self._quote("remora", "plan", release, "--wave", "1")
        self._quote("remora", "rollout", "start", release, *_ROLLOUT)
        self._say_builds()
        surveys = [self._survey(agent, (BASE,)) for agent in self._fleet.agents]
        self._say_answers(surveys)
        self._facts.append(("bundle shipped", f"{size(bundle.bytes)} to each of 3 devices"))

    def _say_builds(self) -> None:
        built = [a.events("engine.built")[-1]["seconds"] for a in self._fleet.agents]
        text = ", ".join(f"{seconds:.1f} s" for seconds in built)
        self._account.say(f"engines built on the devices in {text}")

    def _ship_adapters(self) -> None:
        cast, adapters = self._cast, self._built.adapters
        shipped = [adapters[cast.first], adapters[f"{cast.second}-1"]]
        references = [f"{a.name}={a.reference}" for a in shipped]
        self._quote("remora", "adapters", "ship", *references, *_ROLLOUT)
        variants = cast.variants(1)
        surveys = [self._survey(agent, variants) for agent in self._fleet.agents]
        self._show_answers(surveys[0], variants)
        self._say_answers(surveys)
        self._say_sizes(shipped)

    def _swap_under_load(self) -> None:
        cast, shop = self._cast, self._shop
        new = self._built.adapters[f"{cast.second}-2"]
        with Traffic(self._fleet.agents, cast) as traffic:
            _wait(CALM_S)
            publish(shop, new)
            self._quote("remora", "adapters", "ship", f"{new.name}={new.reference}", *_ROLLOUT)
            _wait(CALM_S)
        verdict = judge(traffic.requests, cast, self._built.digests())
        _require(verdict.complaints)
        self._check_both_revisions(verdict)
        self._say_swap(verdict)
        surveys = [self._survey(a, cast.variants(2)) for a in self._fleet.agents]
        self._show_answers(surveys[0], (f"{cast.second}-2",))

    def _check_both_revisions(self, verdict: Verdict) -> None:
        for revision in (1, 2):
            if not verdict.answered_by.get(f"{self._cast.second}-{revision}"):
                raise DemoFailed(f"no stream saw revision {revision}: the swap proves nothing")

    def _say_swap(self, verdict: Verdict) -> None:
        swaps = [a.events("release.switched")[-1]["seconds"] * 1000 for a in self._fleet.agents]
        self._account.table(
            ("ANSWERED BY", ">REQUESTS"),
            [(v, str(n)) for v, n in sorted(verdict.answered_by.items())],
        )
        swap = f"{min(swaps):.1f} to {max(swaps):.1f} ms on the devices"
        speed = f"{verdict.tokens / verdict.seconds:.0f} tokens/s over 3 agents"
        self._account.say(
            f"{verdict.requests} requests, none failed, each answered by exactly one digest; "
            f"a request took {verdict.median_s * 1000:.0f} ms (median), "
            f"{verdict.slowest_s * 1000:.0f} ms at most; swap {swap}"
        )
        self._facts += [
            ("swapped under load", f"{verdict.requests} streamed requests, 0 failed, {speed}"),
            ("adapter swap", swap),
        ]

    def _change_precision(self) -> None:
        cast, agent = self._cast, self._fleet.agents[-1]
        bundle, release = self._built.bundles["fp16"], f"{cast.model}-fp16"
        adapters = [self._built.adapters[v] for v in (cast.first, f"{cast.second}-2")]
        chosen = [part for a in adapters for part in ("--adapter", f"{a.name}={a.reference}")]
        self._shop.run(
            *("remora", "releases", "create", "--name", release),
            *("--bundle", bundle.reference, *chosen),
        )
        self._quote(
            "remora", "rollout", "start", release, "--selector", f"name={agent.name}", *_ROLLOUT
        )
        self._say_answers([self._survey(agent, cast.variants(2))])

    def _telemetry(self) -> None:
        # One more sample and one more sync than the last answer.
        _wait(self._fleet.sync_s + 1.5)
        self._quote("remora", "top", "--once")
        rows = self._fleet.operator("top")
        silent = [r["device"]["device_id"] for r in rows if not r.get("metrics")]
        _require([f"{device} sent no telemetry" for device in silent])
        self._quote("remora", "adapters", "list")

    def _stop(self) -> None:
        for daemon in self._shop.daemons:
            status = daemon.terminate()
            if status != 0:
                raise DemoFailed(f"{daemon.name} ended with {status}:\n{daemon.tail()}")
        self._account.say(f"{len(self._shop.daemons)} processes ended with status 0")

    def _survey(self, agent: Agent, variants: Sequence[str]) -> Survey:
        found = survey(agent, self._cast, self._built.digests(), variants)
        _require(found.complaints)
        return found

    def _say_answers(self, surveys: Sequence[Survey]) -> None:
        answers = sum(len(s.answered) for s in surveys)
        tokens, seconds = sum(s.tokens for s in surveys), sum(s.seconds for s in surveys)
        self._account.say(
            f"{answers} answers from {len(surveys)} agents, all correct: {tokens / seconds:.0f} "
            f"tokens/s, up to {max(s.rows_busy for s in surveys)} requests in one batch"
        )
        compared = sum(s.compared_tokens for s in surveys)
        if compared * 2 < tokens:
            raise DemoFailed(f"only {compared} of {tokens} tokens could be compared")
        if max(s.rows_busy for s in surveys) < 2:
            raise DemoFailed("the agents answered one request at a time: no batch was mixed")

    def _show_answers(self, found: Survey, variants: Sequence[str]) -> None:
        # Three that differ in country and in topic.
        shown = self._cast.questions[:: len(self._cast.questions) // 3 + 1]
        rows = [(q, v, found.text(v, q)) for q in shown for v in variants]
        self._account.table(("QUESTION", "ANSWERED BY", "ANSWER"), rows)

    def _say_sizes(self, shipped: Sequence[Artifact]) -> None:
        bundle = self._built.bundles[self._cast.precision].bytes
        for adapter in shipped:
            share = f"{size(adapter.bytes)}, {adapter.bytes / bundle:.1%} of the bundle"
            self._account.say(f"adapter {adapter.name}: {share}")
            self._facts.append((f"adapter {adapter.name} shipped", share))

    def _quote(self, *argv: str) -> None:
        self._account.quote(self._shop.run(*argv).stdout)


_ROLLOUT = ("--wave", "1", "--soak", str(SOAK_S), "--watch")


def _require(complaints: Sequence[str]) -> None:
    if complaints:
        more = f"\n… and {len(complaints) - 10} more" if len(complaints) > 10 else ""
        raise DemoFailed("\n".join(complaints[:10]) + more)


def _wait(seconds: float) -> None:
    threading.Event().wait(seconds)
