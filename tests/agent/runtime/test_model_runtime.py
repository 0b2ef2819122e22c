"""Whole requests on the reference engine: every answer is the one the request gets alone."""

from remora_agent.runtime.api import Accepted, FinishReason
from tests.support.runtime import request


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
