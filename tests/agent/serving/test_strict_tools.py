"""Free answers whose calls of strict tools are held: what passes and what does not."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remora_agent.runtime.constraint import GrammarCompiler, Matcher
from remora_agent.serving.strict_tools import SpecialTokens, holding
from remora_agent.text.tool_reader import CallArguments, CallBegins, Content, ToolReader
from remora_agent.text.tools import FORMATS
from remora_agent.text.vocabulary import token_bytes
from remora_contract.errors import Unsupported
from tests.support.runtime import EOS, VOCAB, byte_tokenizer

SPECIAL = VOCAB - 1
HELD = ("hermes", "mistral", "mistral-args", "granite", "phi")
FUNCTIONS = [
    {
        "name": "move",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"to": {"$ref": "#/$defs/place"}, "n": {"type": "integer"}},
            "required": ["to"],
            "additionalProperties": False,
            "$defs": {"place": {"enum": ["left", "right"]}},
        },
    },
    {
        "name": "say",
        "parameters": {"type": "object", "properties": {"x": {"type": "string"}}},
    },
]


class Held:
    """The grammar of one way of writing calls, over bytes and one special token."""

    def __init__(self, compiler: GrammarCompiler, name: str, special: SpecialTokens) -> None:
        self.form = FORMATS[name]
        self._grammar = compiler.compile(holding(self.form, FUNCTIONS, special)).result(20)

    def start(self) -> Matcher:
        return self._grammar.start()

    def accepts(self, tokens: list[int]) -> bool:
        """As a whole answer."""
        return self._grammar.start().accepts([*tokens, EOS]) == len(tokens) + 1

    def begins(self, tokens: list[int]) -> int:
        """How many of the tokens may come."""
        return self._grammar.start().accepts(tokens)

    def call(self, name: str, arguments: str) -> str:
        if self.form.words:
            return f"{self.form.starts[0]}{name}[ARGS]{arguments}"
        call = f'{{"name": "{name}", "{self.form.argument_key}": {arguments}}}'
        body = f"[{call}]" if self.form.listed else f"\n{call}\n"
        return f"{self.form.starts[0]}{body}{self.form.end}"

    def read(self, text: str) -> tuple[str, list[tuple[str, str]]]:
        """Content and calls, as an answer is read."""
        reader = ToolReader(self.form, ("move", "say"), lambda: "id")
        pieces = [*reader.push(text), *reader.finish()]
        names = [p.name for p in pieces if isinstance(p, CallBegins)]
        arguments = [p.text for p in pieces if isinstance(p, CallArguments)]
        content = "".join(p.text for p in pieces if isinstance(p, Content))
        return content, list(zip(names, arguments, strict=True))


def tokens_of(text: str) -> list[int]:
    return byte_tokenizer().encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def compiler():
    made = GrammarCompiler(lambda: token_bytes(byte_tokenizer(), VOCAB), VOCAB, (EOS,))
    yield made
    made.close()


@pytest.fixture(scope="module", params=HELD)
def held(request, compiler):
    return Held(compiler, request.param, SpecialTokens({}))


def test_valid_calls_pass_with_text_around_them(held):
    left, right = held.call("move", '{"to": "left"}'), held.call("move", '{"to": "right", "n": 3}')
    say = held.call("say", '{"x": 5, "y": [{}]}')
    for text in (left, f"Well.\n{right}", f"{left}\n{say} Done.", f"{say}{right}"):
        assert held.accepts(tokens_of(text)), text
        assert held.read(text)[1], text


WRONG = ('{"to": "up"}', "{}", '{"to": "left", "more": 1}', '{"to": "left", "n": "x"}')


def test_no_other_call_does(held):
    for arguments in WRONG:
        text = held.call("move", arguments)
        assert held.read(text)[1] == [("move", arguments)], "the reader would take it for one"
        assert not held.accepts(tokens_of(text)), text
    assert not held.accepts(tokens_of(held.call("unknown", "{}")))
    assert not held.accepts(tokens_of(held.call("say", "[1]")))
    whole = held.call("move", '{"to": "left"}')
    assert not held.accepts(tokens_of(whole[: whole.index("}")])), "half of one"


def test_a_marker_without_a_call_is_text_where_calls_are_objects(held):
    for text in ("import functools\nprint(1)", "<tool_call>, <|tool_call|>", "[TOOL_CALLS]"):
        if not held.form.words:
            assert held.accepts(tokens_of(text)), text
            assert held.read(text) == (text, [])


def test_lists_of_calls_are_held_one_by_one(held):
    if not held.form.listed:
        return
    say = '{"name": "say", "arguments": {}}'
    for to, passes in (('{"to": "left"}', True), ('{"to": 1}', False)):
        move = f'{{"name": "move", "arguments": {to}}}'
        text = f"{held.form.starts[0]}[{say}, {move}]"
        assert held.accepts(tokens_of(text)) is passes
        assert len(held.read(text)[1]) == 2


FRAGMENTS = st.sampled_from(
    ["<tool_call", "tool_call>", "[TOOL_CALLS", "TOOL_CALLS]", "<|tool_call|", "|>", "function",
     "functool", "{", '{"name": "move", "arguments": {', "[ARGS]", "]", "</tool_call>", "\n", "é🐟"]
)  # fmt: skip
TEXTS = st.lists(st.text(max_size=8) | FRAGMENTS, max_size=8).map("".join)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_every_text_without_a_marker_passes_to_the_letter(held, text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    if not any(start in text for start in held.form.starts):
        assert held.accepts(tokens_of(text)), text


BODIES = ('{"name": "move", "arguments": %s}', '[{"name": "move", "arguments": %s}', "move[ARGS]%s")
MARKERS = sorted({s for name in HELD for s in (*FORMATS[name].starts, FORMATS[name].end)})
CALLS = [body % a for body in BODIES for a in (*WRONG, '{"to": "left"}')]
PARTS = st.sampled_from([*MARKERS, " ", "\u2003\n", ",", "]", "text", *CALLS])


@settings(max_examples=300, deadline=None)
@given(text=st.lists(PARTS, max_size=7).map("".join))
def test_what_passes_holds_no_call_that_does_not_match(held, text):
    """However odd: as the reader of answers sees it."""
    if held.accepts(tokens_of(text)):
        for name, arguments in held.read(text)[1]:
            assert (name, json.loads(arguments)) == ("move", {"to": "left"}), text


LIKELY = tokens_of('"{}[],: movetlfrigh</>|_1')


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_whatever_is_drawn_its_strict_calls_match_their_schema(held, seed):
    """A random walk through what may come, drawn towards a call now and then."""
    rng, matcher, tokens = random.Random(seed), held.start(), []
    begun = held.call("move", '{"to": "left"}')
    begun = tokens_of(begun[: begun.rindex("{")])
    for _ in range(160):
        allowed = matcher.allowed(VOCAB)
        likely = [t for t in LIKELY if allowed[t]] or [t for t in range(VOCAB) if allowed[t]]
        chosen = [rng.choice(likely)]
        if rng.random() < 0.05 and matcher.accepts(begun) == len(begun):
            chosen = begun
        if chosen == [EOS]:
            break
        for token in chosen:
            matcher.advance(token)
        tokens += chosen
    text = byte_tokenizer().decode(tokens)
    for name, arguments in held.read(text)[1]:
        if name == "move":
            found = json.loads(arguments)
            assert found["to"] in ("left", "right"), text
            assert set(found) <= {"to", "n"} and isinstance(found.get("n", 0), int), text


@pytest.mark.parametrize("name", HELD)
def test_a_marker_that_is_a_special_token_begins_a_call_too(compiler, name):
    form = FORMATS[name]
    held = Held(compiler, name, SpecialTokens({form.starts[-1]: SPECIAL}))
    body = held.call("move", '{"to": "left"}').removeprefix(form.starts[0])
    right, wrong = tokens_of(body), tokens_of(body.replace("left", "down"))
    assert held.accepts([*tokens_of("Now. "), SPECIAL, *right])
    assert not held.accepts([SPECIAL, *wrong])
    assert not held.accepts([SPECIAL, *tokens_of("no call")])


def test_other_special_tokens_are_as_free_as_text(compiler):
    held = Held(compiler, "hermes", SpecialTokens({}, [SPECIAL]))
    call = tokens_of(held.call("move", '{"to": "left"}'))
    assert held.accepts([SPECIAL, *tokens_of("thinks"), SPECIAL, *call, SPECIAL])
    assert held.begins([*call[:20], SPECIAL]) == 20


@pytest.mark.parametrize("name", sorted(set(FORMATS) - set(HELD)))
def test_ways_of_writing_that_no_grammar_holds_are_refused_by_name(name):
    with pytest.raises(Unsupported, match=f"strict of move.*{name}.*tool_choice"):
        holding(FORMATS[name], FUNCTIONS, SpecialTokens({}))
