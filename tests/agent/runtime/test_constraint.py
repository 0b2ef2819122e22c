"""Answers match their constraint whatever the model's logits say, and grammars are bounded.

The reference engine's logits are noise, so that without a constraint nothing would match.
"""

import json
import random
import re
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remora_agent.runtime.api import (
    Constraint,
    ConstraintKind,
    FinishReason,
    SamplingParams,
    Scoring,
)
from remora_agent.runtime.constraint import COMPILE_TIMEOUT_S, WORKERS, GrammarCompiler
from remora_agent.serving.tool_calls import calling
from remora_agent.text.tools import FORMATS
from remora_agent.text.vocabulary import token_bytes
from remora_contract.errors import (
    Exhausted,
    InternalFault,
    RequestInvalid,
    Unavailable,
    Unsupported,
)
from tests.support.runtime import EOS, VOCAB, Listener, byte_tokenizer, request
from tests.support.schemas import matches, random_schema

KIND = ConstraintKind


def compiler(eos=(EOS,)):
    return GrammarCompiler(lambda: token_bytes(byte_tokenizer(), VOCAB), VOCAB, eos)


@pytest.fixture(scope="module")
def grammars():
    made = compiler()
    yield made
    made.close()


def schema(document) -> Constraint:
    return Constraint(KIND.JSON_SCHEMA, json.dumps(document))


def regex(text) -> Constraint:
    return Constraint(KIND.REGEX, text)


def submit(s, constraint, request_id="a", seed=0, max_tokens=900, **more):
    """`seed` None is greedy."""
    sampling = SamplingParams() if seed is None else SamplingParams(1.0, seed=seed)
    wanted = {"ignore_eos": False, "max_tokens": max_tokens, "sampling": sampling, **more}
    made = replace(request(request_id, **wanted), constraint=constraint)
    listener = Listener()
    s.runtime.submit(made, listener, s.runtime.compile(constraint).result(20))
    return listener


def test_answers_to_random_schemas_always_validate(serve):
    s = serve({"a": 4}, rows=4, context=4096)
    rng = random.Random(4)
    schemas = [random_schema(rng) for _ in range(200)]
    for start in range(0, len(schemas), 4):
        batch = schemas[start : start + 4]
        heard = [
            submit(s, schema(d), f"{start + i}", seed=i, adapters={"a": 1.0} if i % 2 else None)
            for i, d in enumerate(batch)
        ]
        for document, listener in zip(batch, heard, strict=True):
            text = listener.wait(60).text
            assert listener.finished.reason is FinishReason.STOP, (document, text)
            assert matches(json.loads(text), document), (document, text)


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
@pytest.mark.parametrize("pattern", [r"[a-c]{3}", r"(yes|no)!?", r"\d{4}-\d\d-\d\d", "é+x|🐟{2}"])
def test_answers_match_their_expression_and_end_with_it(serve, pattern, seed):
    heard = submit(serve(context=1024), regex(pattern), seed=seed).wait()
    if heard.finished.reason is FinishReason.STOP:
        assert re.fullmatch(pattern, heard.text)
    else:
        assert seed is None  # a greedy model may prefer one character for ever
        assert heard.finished.reason is FinishReason.LENGTH


def test_an_answer_ends_with_its_grammar_without_an_end_of_sequence_token(serve):
    heard = submit(serve(), regex("abc")).wait()
    assert heard.text == "abc" and EOS not in heard.tokens
    assert heard.finished.reason is FinishReason.STOP


def test_end_of_sequence_comes_only_where_the_grammar_is_complete(serve):
    """Biased towards the end with all its might, the model still writes the whole of it."""
    eager = SamplingParams(logit_bias=((EOS, 100.0),))
    heard = submit(serve(), regex("ab?c?[xyz]{2}z*"), sampling=eager).wait()
    assert re.fullmatch("ab?c?[xyz]{2}", heard.text) and heard.tokens[-1] == EOS


def test_min_tokens_hold_off_the_end_where_the_grammar_goes_on(serve):
    eager = SamplingParams(logit_bias=((EOS, 100.0),))
    heard = submit(serve(), regex("[ab]*"), sampling=eager, min_tokens=5).wait()
    assert re.fullmatch("[ab]{5}", heard.text)


def test_where_nothing_may_come_the_answer_ends_with_an_error(serve):
    heard = submit(serve(), regex("a"), min_tokens=2, stop_token_ids=(64,)).wait()
    assert isinstance(heard.error, RequestInvalid) and "no token" in str(heard.error)


def test_a_lark_grammar_is_followed(serve):
    grammar = """start: greeting " " name
greeting: "hello" | "good" " " ("morning" | "night")
name: /[A-Z][a-z]{1,5}/
"""
    for seed in range(5):
        text = submit(serve(), Constraint(KIND.LARK, grammar), seed=seed).wait().text
        assert re.fullmatch(r"(hello|good (morning|night)) [A-Z][a-z]{1,5}", text)


@pytest.mark.parametrize("form", ["hermes", "llama", "mistral"])
def test_the_references_of_a_forced_calls_schemas_are_their_own(grammars, form):
    """As models of pydantic write them: each schema has a root, and definitions below it."""

    def function(name: str, of_point: dict) -> dict:
        point = {"type": "object", "properties": {"x": of_point, "next": {"$ref": "#/$defs/P"}}}
        properties = {"p": {"$ref": "#/$defs/P"}}
        parameters = {"type": "object", "$defs": {"P": point}, "properties": properties}
        return {"name": name, "parameters": parameters}

    functions = [function("one", {"type": "integer"}), function("two", {"type": "boolean"})]
    tool = FORMATS[form]
    grammar = grammars.compile(calling(tool, functions, 1)).result(20)

    def accepts(name: str, point: str) -> bool:
        call = f'{{"name": "{name}", "{tool.argument_key}": {{"p": {point}}}}}'
        text = f"[{call}]" if tool.listed else call
        if not (tool.listed or tool.bare):
            text = f"{tool.starts[0]}\n{text}\n{tool.end}"
        ids = byte_tokenizer().encode(text, add_special_tokens=False).ids
        return grammar.start().accepts(ids) == len(ids)

    assert accepts("one", '{"x": 1, "next": {"x": 2}}') and accepts("two", '{"x": true}')
    assert not accepts("one", '{"x": true}') and not accepts("two", '{"next": {"x": 2}}')


def test_a_forced_call_cannot_go_on_with_blanks_for_ever(serve):
    """A model that would write nothing but blanks writes the call."""
    function = {"name": "f", "parameters": {"type": "object", "additionalProperties": False}}
    ids = byte_tokenizer().encode(" \t\r\n").ids
    blanks = SamplingParams(logit_bias=tuple((i, 100.0) for i in ids))
    constraint = calling(FORMATS["hermes"], [function], 1)
    heard = submit(serve(context=1024), constraint, sampling=blanks).wait()
    assert heard.finished.reason is FinishReason.STOP
    call = heard.text.removeprefix("<tool_call>").removesuffix("</tool_call>")
    assert json.loads(call) == {"name": "f", "arguments": {}}


def test_any_json_object_is_an_object(serve):
    heard = submit(serve(context=4096), Constraint(KIND.JSON_OBJECT), max_tokens=3000)
    heard.wait(60)
    if heard.finished.reason is FinishReason.STOP:
        assert isinstance(json.loads(heard.text), dict)
    assert heard.text.startswith("{")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=6), st.integers(0, 9))
def test_every_choice_can_be_written_exactly_and_nothing_else(grammars, options, seed):
    try:
        [o.encode() for o in options]
    except UnicodeEncodeError:
        return
    matcher = grammars.compile(Constraint(KIND.CHOICE, options=tuple(options))).result(20).start()
    wanted = random.Random(seed).choice(options)
    for byte in wanted.encode():
        token = BYTES[byte]
        assert matcher.allowed(VOCAB)[token]
        matcher.advance(token)
    assert matcher.finished or matcher.allowed(VOCAB)[EOS]
    written = np.flatnonzero(matcher.allowed(VOCAB))
    longer = {
        o.encode()[len(wanted.encode())] for o in options if o != wanted and _begins(o, wanted)
    }
    assert {t for t in written.tolist() if t != EOS} == {BYTES[b] for b in longer}


def _begins(option, text):
    return option.encode().startswith(text.encode())


BYTES = {
    content[0]: token
    for token, content in enumerate(token_bytes(byte_tokenizer(), VOCAB)[0])
    if len(content) == 1
}


def test_one_compilation_serves_many_answers_that_do_not_touch_each_other(serve):
    s = serve()
    one = regex("[ab]{12}")
    assert s.runtime.compile(one).result(20) is s.runtime.compile(one).result(20)
    heard = [submit(s, one, f"{i}", seed=i) for i in range(16)]
    texts = {h.wait().text for h in heard}
    assert len(texts) > 1 and all(re.fullmatch("[ab]{12}", t) for t in texts)


def test_logprobs_are_those_of_the_model_without_the_constraint(serve):
    s, one = serve(), regex("abc")
    made = replace(request("a", ignore_eos=False), constraint=one, scoring=Scoring(top=1))
    heard = Listener()
    s.runtime.submit(made, heard, s.runtime.compile(one).result(20))
    scores = [p for e in heard.wait().events[1:-1] for p in e.logprobs]
    assert len(scores) == 3 and any(p.logprob < p.top[0][1] for p in scores)


def test_a_grammar_must_be_compiled_before_its_request(serve):
    with pytest.raises(InternalFault):
        serve().runtime.submit(replace(request("a"), constraint=regex("a")), Listener())


def test_a_seed_gives_one_answer_whatever_else_runs(serve):
    one = regex("[a-z]{30}")
    alone = submit(serve(), one, seed=7).wait().text
    s = serve()
    others = [submit(s, regex("[0-9]{40}"), f"o{i}", seed=i) for i in range(3)]
    assert submit(s, one, "mine", seed=7).wait().text == alone
    assert all(re.fullmatch("[0-9]{40}", o.wait().text) for o in others)


WRONG = [
    (Constraint(KIND.REGEX, "[a-"), "unclosed"),
    (Constraint(KIND.REGEX, "(?=a)b"), "look-around"),
    (Constraint(KIND.REGEX, "("), "unclosed"),
    (Constraint(KIND.LARK, 'start: "a" | nope'), "nope"),
    (Constraint(KIND.LARK, "no grammar at all"), "lark"),
    (Constraint(KIND.JSON_SCHEMA, "{"), "not valid JSON"),
    (Constraint(KIND.JSON_SCHEMA, "[]"), "JSON object"),
    (Constraint(KIND.JSON_SCHEMA, "[" * 60_000), "not valid JSON"),
    (schema({"type": "string", "not": {}}), "not"),
    (schema({"$ref": "#"}), "no text satisfies"),
    (schema({"$ref": "http://example.com/x.json"}), "example.com"),
    (schema({"allOf": [{"type": "string"}, {"type": "integer"}]}), "Unsatisfiable"),
    (schema({"type": "nonsense"}), "nonsense"),
    (schema({"type": "string", "pattern": "["}), "regex"),
    # What Python reads as JSON and llguidance does not.
    (Constraint(KIND.JSON_SCHEMA, '{"const": NaN}'), "line 1"),
    (Constraint(KIND.JSON_SCHEMA, '{"const": "\\ud800"}'), "hex escape"),
    (Constraint(KIND.JSON_SCHEMA, '{"minimum": 1e999}'), "out of range"),
    (Constraint(KIND.JSON_SCHEMA, '{"not":' * 200 + "{}" + "}" * 200), "recursion limit"),
    (Constraint(KIND.REGEX, "\ud800"), "half a character"),
    (Constraint(KIND.CHOICE, options=("fine", "\udfff")), "half a character"),
]


@pytest.mark.parametrize(("constraint", "words"), WRONG)
def test_a_constraint_that_cannot_be_is_refused_with_what_is_wrong(grammars, constraint, words):
    with pytest.raises(RequestInvalid, match="constraint") as refused:
        grammars.compile(constraint).result(20)
    assert words in str(refused.value)
    assert len(str(refused.value)) < 400


BOUNDED = [
    Constraint(KIND.REGEX, "a" * (64 << 10) + "b"),
    Constraint(KIND.REGEX, "é" * (33 << 10)),
    Constraint(KIND.CHOICE),
    Constraint(KIND.CHOICE, options=("a", "")),
    Constraint(KIND.CHOICE, options=("a",) * 1025),
    Constraint(KIND.CHOICE, options=("x" * 40_000, "y" * 40_000)),
    Constraint(KIND.REGEX),
    Constraint(KIND.LARK, "  "),
    Constraint(KIND.JSON_SCHEMA, ""),
    Constraint(KIND.JSON_OBJECT, "{}"),
]


@pytest.mark.parametrize("constraint", BOUNDED)
def test_what_is_empty_or_too_large_never_reaches_the_compiler(grammars, constraint):
    with pytest.raises(RequestInvalid, match="constraint"):
        grammars.compile(constraint)


BOMBS = [
    regex("((a{1,1000}){1,1000}){1,1000}"),
    regex(".*a.{500}b.{500}c"),
    regex(r"(\w+\s?)+[A-Z]{1,900}" * 20),
    regex("(" * 30_000 + "a" + ")" * 30_000),
    regex("|".join(f"w{i}" for i in range(8000))),
    Constraint(KIND.LARK, "start: s\ns: s s s s | s s | " + '"a" | '),
    Constraint(KIND.LARK, "start: " + "(" * 30_000 + '"a"' + ")" * 30_000),
    Constraint(KIND.LARK, 'start: (("a"{1,100000}){1,100000}){1,100000}'),
    schema(
        {
            "allOf": [
                {"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(9)]} for i in range(9)
            ]
        }
    ),
    schema({"anyOf": [{"properties": {f"p{i}": {"type": "string"}}} for i in range(1500)]}),
    schema({"properties": {f"p{i}": {} for i in range(3000)}}),
    schema({"type": "array", "minItems": 10**9, "items": {"type": "array", "minItems": 10**9}}),
    schema({"type": "string", "minLength": 10**9}),
    Constraint(KIND.JSON_SCHEMA, '{"items":' * 6000 + "{}" + "}" * 6000),
]


@pytest.mark.parametrize("constraint", BOMBS, ids=range(len(BOMBS)))
def test_bombs_are_refused_or_run_within_their_limits(serve, constraint):
    """They end in time, as an answer or an error; nothing crashes and other answers go on."""
    s = serve(context=256)
    began = time.process_time()
    try:
        heard = submit(s, constraint, max_tokens=40).wait(60)
    except RequestInvalid as e:
        assert "constraint" in str(e)
    else:
        assert heard.events
    assert time.process_time() - began < 10
    assert submit(s, regex("ok"), "after").wait().text == "ok"


def test_too_many_grammars_that_wait_are_refused(monkeypatch):
    made = compiler()
    gate = threading.Event()
    monkeypatch.setattr(made, "_over_tokens", lambda: gate.wait(20) and compiler()._over_tokens())
    waiting = [made.compile(regex(f"a{i}")) for i in range(16)]
    with pytest.raises(Exhausted):
        made.compile(regex("one more"))
    gate.set()
    assert all(w.result(20) for w in waiting)
    made.close()
    with pytest.raises(Unavailable):
        made.compile(regex("late"))


def test_a_model_without_an_end_of_sequence_takes_no_constraint():
    with pytest.raises(Unsupported, match="end-of-sequence"):
        compiler(eos=()).compile(regex("a")).result(20)


def test_every_end_of_sequence_token_may_end_a_grammar():
    matcher = compiler(eos=(EOS, EOS + 1)).compile(regex("a?")).result(20).start()
    assert matcher.allowed(VOCAB)[[EOS, EOS + 1]].all()


def test_the_mask_has_the_length_of_the_logits(grammars):
    matcher = grammars.compile(regex("a")).result(20).start()
    assert matcher.allowed(300).shape == (300,) and not matcher.allowed(300)[258:].any()
    assert matcher.allowed(VOCAB).sum() == matcher.allowed(300).sum() == 1


def test_a_draft_is_accepted_up_to_the_first_token_that_may_not_come(grammars):
    matcher = grammars.compile(regex("abc")).result(20).start()
    a, b, c, d = (BYTES[x] for x in b"abcd")
    assert matcher.accepts([a, b, d, c]) == 2
    assert matcher.accepts([a, b, c]) == 3  # nothing was advanced


def test_a_grammar_that_comes_while_the_compiler_closes_is_told_so_or_compiled(monkeypatch):
    made = compiler()
    submit, closers = made._workers.submit, []

    def close_first(*work):
        closers.append(threading.Thread(target=made.close))
        closers[0].start()
        closers[0].join(0.2)
        return submit(*work)

    monkeypatch.setattr(made._workers, "submit", close_first)
    future = made.compile(regex("a+"))
    closers[0].join(10)
    assert future.exception(10) is None or isinstance(future.exception(), Unavailable)
    with pytest.raises(Unavailable):
        made.compile(regex("b+"))


def test_grammars_that_compile_for_too_long_leave_threads_to_others_and_are_bounded(monkeypatch):
    now, gate, real = [0.0], threading.Event(), GrammarCompiler._compiled

    def slow(compiler, constraint, text):
        if "slow" in constraint.text:
            gate.wait(20)
        return real(compiler, constraint, text)

    monkeypatch.setattr(GrammarCompiler, "_compiled", slow)
    compiler = GrammarCompiler(
        lambda: token_bytes(byte_tokenizer(), VOCAB), VOCAB, (EOS,), lambda: now[0]
    )
    try:
        stuck = [compiler.compile(regex(f"slow{i}")) for i in range(WORKERS - 1)]
        assert compiler.compile(regex("a")).result(20)
        stuck.append(compiler.compile(regex("slow at last")))
        while not all(f.running() for f in stuck) or len(compiler._began) < WORKERS:
            threading.Event().wait(0.005)
        now[0] = COMPILE_TIMEOUT_S + 1
        with pytest.raises(Exhausted, match="no thread is left"):
            compiler.compile(regex("b"))
        assert compiler.compile(regex("a")).result(0)  # kept
        gate.set()
        for future in stuck:
            future.result(20)
        assert compiler.compile(regex("b")).result(20)
    finally:
        gate.set()
        compiler.close()
