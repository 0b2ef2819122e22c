"""Grammars, messages and files made to harm who reads them."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest

from remora_agent.client import FinishReason
from remora_contract.errors import ArtifactInvalid, RequestInvalid
from tests.agent.serving.company import LONG, nothing_left, slowly, wait_until
from tests.support.runtime import EOS

BOMBS = [
    {"regex": "((a{1,1000}){1,1000}){1,1000}"},
    {"regex": "(" * 30_000 + "a" + ")" * 30_000},
    {"lark": "start: s0\n" + "".join(f"s{i}: s{i + 1} s{i + 1}\n" for i in range(60)) + 's60: "x"'},
    {"json_schema": '{"items":' * 6000 + "{}" + "}" * 6000},
    {"json_schema": json.dumps({"type": "string", "minLength": 10**9})},
    {
        "json_schema": json.dumps(
            {
                "$ref": "#/$defs/d0",
                "$defs": {
                    **{f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(60)},
                    "d60": {"type": "integer"},
                },
            }
        )
    },
]


@pytest.mark.parametrize("bomb", BOMBS, ids=range(len(BOMBS)))
def test_a_grammar_that_explodes_is_refused_or_bounded_while_a_stream_goes_on(served, bomb):
    stream = served.client.stream("hello", **LONG)
    next(stream)
    with suppress(RequestInvalid):
        served.client.generate("x", max_tokens=20, temperature=0.0, **bomb)
    list(stream)
    assert stream.result.token_ids == served.solo("hello", 240)
    wait_until(lambda: nothing_left(served.stack), "nothing is left of it")


@pytest.mark.parametrize(
    "content",
    [
        "{{ 7 * 7 }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ messages.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{# #}{% raw %}",
    ],
)
def test_a_message_that_looks_like_a_template_is_only_text(served, content):
    messages = [{"role": "user", "content": content}]
    rendered = served.client.tokenize(messages).rendered
    assert rendered == f"u:{content}\na:"


def test_a_special_tokens_text_in_a_message_is_that_token_as_the_page_says(served):
    """As transformers has it; docs/serving.md tells applications what to do about it."""
    tokens = served.client.tokenize([{"role": "user", "content": "a<eos>b"}])
    assert tokens.rendered == "u:a<eos>b\na:"
    assert tokens.ids.count(EOS) == 1


def test_an_adapters_files_replaced_on_disk_change_no_answer_and_are_told_when_read_again(
    served, world
):
    options = {"adapter": "a", "max_tokens": 8, "ignore_eos": True}
    first = served.client.generate("hello", **options)
    here, other = (world.adapter(name).directory for name in "ab")
    for file in other.iterdir():
        (here / file.name).write_bytes(file.read_bytes())
    assert served.client.generate("hello", **options).token_ids == first.token_ids
    served.client.unload_adapter("a")
    with pytest.raises(ArtifactInvalid, match="new revision"):
        served.client.generate("hello", **options)
    again = served.client.generate("hello", adapter="b", max_tokens=8, ignore_eos=True)
    assert again.token_ids == served.solo("hello", 8, {"b": 1.0})
    assert nothing_left(served.stack)


def test_an_adapter_unloaded_under_a_stream_ends_it_with_a_reason(served):
    slowly(served.engine)
    stream = served.client.stream("hello", adapter="a", **LONG)
    next(stream)
    served.client.unload_adapter("a", mode="cancel")
    list(stream)
    assert stream.result.finish_reason is FinishReason.CANCELLED
    wait_until(lambda: nothing_left(served.stack), "its lease is gone")
