"""Each call enters exactly one model, whatever is switched meanwhile."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from remora_agent.serving.router import Router
from remora_contract.errors import Exhausted, Unavailable


class Model:
    """Counts who is inside; closing it while someone is would be the fault."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.closed = False


async def name_of_entered(router: Router[Model]) -> str:
    async with router.entering() as model:
        await asyncio.sleep(0)
        assert not model.closed
        return model.name


def test_calls_before_the_first_model_are_told_to_come_back():
    router: Router[Model] = Router()
    assert router.state == "loading"
    with pytest.raises(Unavailable, match="no model"):
        asyncio.run(name_of_entered(router))


def test_replace_waits_for_calls_on_their_way_into_the_old_model():
    router: Router[Model] = Router()
    old, new = Model("old"), Model("new")
    router.replace(old)
    with ThreadPoolExecutor(1) as pool:
        with router.entering_blocking() as entered:
            switched = pool.submit(router.replace, new)
            while router.current is not new:
                threading.Event().wait(0.001)
            assert entered is old
            assert not switched.done()
            with router.entering_blocking() as next_one:
                assert next_one is new
        assert switched.result() is old


def test_held_calls_wait_and_then_enter_the_new_model_in_order():
    router: Router[Model] = Router()
    router.replace(Model("old"))
    router.hold()
    assert router.state == "loading"

    async def main() -> list[str]:
        calls = [asyncio.ensure_future(name_of_entered(router)) for _ in range(3)]
        while router.waiting < 3:
            await asyncio.sleep(0)
        router.replace(Model("new"))
        return await asyncio.gather(*calls)

    assert asyncio.run(main()) == ["new"] * 3


def test_more_held_calls_than_the_bound_are_refused_with_a_time_to_come_back():
    router: Router[Model] = Router(hold_limit=1, retry_after_s=3.0)
    router.replace(Model("old"))
    router.hold()

    async def main() -> Exhausted:
        first = asyncio.ensure_future(name_of_entered(router))
        while router.waiting < 1:
            await asyncio.sleep(0)
        with pytest.raises(Exhausted) as refused:
            await name_of_entered(router)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        # A caller that gave up makes room.
        second = asyncio.ensure_future(name_of_entered(router))
        while router.waiting < 1:
            await asyncio.sleep(0)
        router.replace(Model("new"))
        assert await second == "new"
        return refused.value

    assert asyncio.run(main()).retry_after_s == 3.0


def test_closing_and_clearing_fail_the_calls_that_wait():
    for end in (lambda r: r.close(), lambda r: r.clear("gone")):
        router: Router[Model] = Router()
        router.replace(Model("old"))
        router.hold()

        async def main(router: Router[Model] = router, end=end) -> None:
            waiting = asyncio.ensure_future(name_of_entered(router))
            while router.waiting < 1:
                await asyncio.sleep(0)
            end(router)
            with pytest.raises(Unavailable):
                await waiting

        asyncio.run(main())
        with pytest.raises(Unavailable):
            asyncio.run(name_of_entered(router))


def test_a_caller_cancelled_while_being_let_in_leaves_no_trace():
    router: Router[Model] = Router()
    router.replace(Model("old"))
    router.hold()

    async def main() -> None:
        call = asyncio.ensure_future(name_of_entered(router))
        while router.waiting < 1:
            await asyncio.sleep(0)
        router.replace(Model("new"))  # resolves the ticket ...
        call.cancel()  # ... and the caller gives up before it hears of it
        await asyncio.gather(call, return_exceptions=True)

    asyncio.run(main())
    assert router.hold() is not None  # would wait for ever if the call still counted


def test_a_caller_cancelled_while_being_refused_is_cancelled():
    router: Router[Model] = Router()
    router.replace(Model("old"))
    router.hold()

    async def main() -> None:
        call = asyncio.ensure_future(name_of_entered(router))
        while router.waiting < 1:
            await asyncio.sleep(0)
        router.clear("gone")
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert call.cancelled()

    asyncio.run(main())


def test_no_call_meets_a_closed_model_under_switches_from_another_thread():
    router: Router[Model] = Router()
    router.replace(Model("0"))
    done, turn = threading.Event(), threading.Semaphore(0)

    def switch() -> None:
        for i in range(1, 200):
            turn.acquire()
            if i % 3 == 0:
                held = router.hold()
                assert held is not None
                held.closed = True
            old = router.replace(Model(str(i)))
            if old is not None:
                old.closed = True
        done.set()

    async def main() -> int:
        thread = threading.Thread(target=switch)
        thread.start()
        calls = 0
        while not done.is_set():
            turn.release()
            await asyncio.gather(*(name_of_entered(router) for _ in range(20)))
            calls += 20
        thread.join()
        return calls

    assert asyncio.run(main()) > 0
