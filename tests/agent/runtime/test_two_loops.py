"""The step thread and the callers' threads never wait for each other: what callers do returns while
a step computes and while a listener hears, so neither loop can hold up the other."""

import threading
from concurrent.futures import ThreadPoolExecutor

from tests.support.runtime import Listener, request


def everything_callers_do(s, name):
    """Each from another thread, with the step thread where it stands."""
    runtime = s.runtime
    calls = [
        lambda: runtime.submit(request(name, (1, 2), 2), Listener()),
        lambda: runtime.cancel(name),
        lambda: runtime.cancel("nobody"),
        runtime.status,
        runtime.metrics,
        lambda: runtime.withdraw({name}, lambda _: False),
    ]
    with ThreadPoolExecutor(1) as pool:
        for call in calls:
            pool.submit(call).result(timeout=10)


def test_callers_are_answered_while_the_engine_computes(serve):
    s, done = serve(rows=1), threading.Event()

    def during_the_step():
        s.engine.before_step = lambda: None
        everything_callers_do(s, "inside")
        done.set()

    s.engine.before_step = during_the_step
    s.submit(request("a", (1, 2, 3), 3)).wait()
    assert done.is_set()


def test_callers_are_answered_while_a_listener_hears(serve):
    s, kinds = serve(rows=1), []

    def listen(event):
        everything_callers_do(s, f"from {type(event).__name__}")
        kinds.append(type(event).__name__)
        heard(event)

    heard = Listener()
    s.runtime.submit(request("a", (1, 2, 3), 2), listen)
    heard.wait()
    assert kinds[0] == "Accepted" and kinds[-1] == "Finished"


def test_a_listener_may_call_back_on_the_step_thread_itself(serve):
    s = serve(rows=1)
    second = Listener()

    def listen(event):
        if type(event).__name__ == "Accepted":
            s.runtime.submit(request("b", (4, 5), 2), second)
            s.runtime.cancel("a")

    s.runtime.submit(request("a", (1, 2, 3), 50), listen)
    assert second.wait().tokens == s.solo(request("b", (4, 5), 2))
