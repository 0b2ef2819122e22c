"""An answer's text, taken apart as it arrives: what is content, what are calls of tools.

Markup never becomes content, unless it turns out not to be a call: what is no valid call of a
known function stays content, markers included. Pure; holds back no more than the piece of text
that is not decided yet.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from remora_agent.text.tool_bodies import (
    NO_CALL,
    BodyReader,
    ElementCall,
    PythonCalls,
    from_json,
    to_json,
)
from remora_agent.text.tools import ToolFormat

_MAX_HEADER = 160  # characters of `name[CALL_ID]id[ARGS]`


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class CallBegins:
    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A piece of the call's arguments, JSON as the model wrote it."""

    index: int
    text: str


Piece = Content | CallBegins | CallArguments


class _At(Enum):
    CONTENT = auto()
    CALL = auto()  # after a start marker or a separator: a call should begin
    ARGUMENTS = auto()  # a call was announced, its arguments stream
    TAIL = auto()  # after arguments that were streamed: the call's own closing brace
    AFTER = auto()  # after a call


class ToolReader:
    """Of one answer. `eager` hands a call's arguments out while they are written: then they may
    turn out to be no valid JSON; otherwise a call comes when it is complete and valid.

    `forced`: a constraint makes the model write calls, without the start marker.
    `max_calls`: calls beyond are dropped (None: none is). `schemas`: the functions' parameters.
    Calls that are not JSON always come when they are complete.
    """

    def __init__(
        self,
        form: ToolFormat,
        names: Iterable[str],
        new_id: Callable[[], str],
        *,
        eager: bool = False,
        forced: bool = False,
        max_calls: int | None = None,
        schemas: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self._schemas = {name: (schemas or {}).get(name, {}) for name in names}
        self._form, self._names, self._new_id = form, frozenset(self._schemas), new_id
        self._eager, self._max_calls = eager, max_calls
        self._text = ""  # not decided yet, the white space and the marker before a call included
        self._at = _At.CALL if forced else _At.CONTENT
        self._bare = form.bare  # a brace begins a call: at the begin and after another call
        self._in_list = self._bracket = False  # a list of calls is open; was opened
        self._count = 0
        self._nesting = _Nesting(0)
        self._foreign = self._foreign_reader()

    @property
    def calls(self) -> int:
        return self._count if self._max_calls is None else min(self._count, self._max_calls)

    @property
    def unfinished(self) -> bool:
        """The last call was handed out as it was written, and its arguments do not end yet."""
        return self._at is _At.ARGUMENTS

    def push(self, text: str) -> list[Piece]:
        self._text += text
        return self._run(ended=False)

    def finish(self) -> list[Piece]:
        """What was held back, when no text follows. White space after calls is no content."""
        pieces = self._run(ended=True)
        if self._text.strip() or not self._count:
            pieces = _tidy([*pieces, *_content(self._text)], self._max_calls)
        self._text = ""
        return pieces

    def _run(self, *, ended: bool) -> list[Piece]:
        pieces: list[Piece] = []
        while (step := self._step(ended)) is not None:
            pieces += step
        return _tidy(pieces, self._max_calls)

    def _step(self, ended: bool) -> list[Piece] | None:
        """One move; None when it takes more text to make one."""
        if self._at is _At.CONTENT:
            return self._read_content(ended)
        if self._at is _At.CALL:
            return self._read_call(ended)
        if self._at is _At.ARGUMENTS:
            return self._read_arguments()
        return self._read_tail() if self._at is _At.TAIL else self._read_after(ended)

    def _read_content(self, ended: bool) -> list[Piece] | None:
        text = self._text
        if self._bare and text.lstrip().startswith(self._form.opening):
            return self._expect_call("")
        found = min((text.find(s) for s in self._form.starts if s in text), default=None)
        if found is not None:
            return self._expect_call(text[:found].rstrip())
        given = text if ended else text[: _decided(text, self._form.starts)]
        if not given or (self._count and not given.strip()):
            return None
        self._text, self._bare = text[len(given) :], False
        return [Content(given)]

    def _expect_call(self, before: str) -> list[Piece]:
        self._text = self._text[len(before) :]
        self._at, self._nesting = _At.CALL, _Nesting(0)
        self._foreign = self._foreign_reader()
        return _content(before)

    def _foreign_reader(self) -> BodyReader | None:
        """For a call that is not JSON."""
        if self._form.opening == "<":
            return ElementCall(self._schemas)
        return PythonCalls(self._names) if self._form.opening == "[" else None

    def _read_call(self, ended: bool) -> list[Piece] | None:
        text, start = self._text, self._body()
        if start is None:
            return self._no_call()
        if start == len(text):
            return self._no_call() if ended and text else None
        if self._foreign is not None:
            return self._read_foreign(self._foreign, start, ended)
        header = self._form.header.match(text, start)
        if header is not None and header["name"] not in self._names:
            return self._no_call()
        if header is not None and self._eager:
            return self._announce(header)
        if not self._form.words:
            return self._whole_object(start, header, ended)
        if header is not None:
            return self._whole_arguments(header, ended)
        return self._no_call() if ended or len(text) - start > _MAX_HEADER else None

    def _read_foreign(self, reader: BodyReader, start: int, ended: bool) -> list[Piece] | None:
        found = reader.read(self._text, start)
        if found is None:
            return self._no_call() if ended else None
        if found == NO_CALL:
            return self._no_call()
        return self._complete(found.end, found.calls)

    def _body(self) -> int | None:
        """Where the call itself begins; the end of the text while that is still open; None when
        what stands there begins none."""
        text = self._text
        place = _after_space(text, 0)
        place += len(next((s for s in self._form.starts if text.startswith(s, place)), ""))
        place = _after_space(text, place)
        if self._form.listed and not self._in_list:
            self._bracket = text.startswith("[", place)  # one call may stand without a list
            place = _after_space(text, place + self._bracket)
        if not self._form.words and place < len(text) and text[place] != self._form.opening:
            return None
        return place

    def _no_call(self) -> list[Piece]:
        """The marker, or one character, is content; what follows is looked at anew."""
        text = self._text
        place = _after_space(text, 0)
        marker = next((s for s in self._form.starts if text.startswith(s, place)), "")
        end = place + max(len(marker), 1)
        self._text, self._at = text[end:], _At.CONTENT
        self._in_list = self._bare = False
        return [Content(text[:end])]

    def _announce(self, header: re.Match[str]) -> list[Piece]:
        self._text, self._at = self._text[header.end() :], _At.ARGUMENTS
        self._nesting, self._in_list = _Nesting(0), self._bracket
        self._count += 1
        return [CallBegins(self._count - 1, self._new_id(), header["name"])]

    def _read_arguments(self) -> list[Piece] | None:
        if not self._text:
            return None
        end = self._nesting.end(self._text, 0)
        given = self._text[:end]
        self._text = self._text[len(given) :]
        if end is not None:
            self._at = _At.AFTER if self._form.words else _At.TAIL
        self._nesting = _Nesting(1) if end is not None else self._nesting.rebased()
        return [CallArguments(self._count - 1, given)]

    def _read_tail(self) -> list[Piece] | None:
        """To the closing brace of the object whose arguments were given."""
        end = self._nesting.end(self._text, 0)
        self._text = "" if end is None else self._text[end:]
        if end is None:
            self._nesting = self._nesting.rebased()
            return None
        self._at = _At.AFTER
        return []

    def _whole_object(
        self, start: int, header: re.Match[str] | None, ended: bool
    ) -> list[Piece] | None:
        end = self._nesting.end(self._text, start)
        if end is None:
            return self._no_call() if ended else None
        call = _object(self._text[start:end])
        arguments = call.get("arguments", call.get("parameters"))
        name = call.get("name")
        if not isinstance(arguments, dict) or name not in self._names:
            return self._no_call()
        raw = to_json(arguments)
        if header is not None:
            place = _Nesting(0).end(self._text, header.end())
            raw = self._text[header.end() : place]
        return self._complete(end, [(str(name), raw)])

    def _whole_arguments(self, header: re.Match[str], ended: bool) -> list[Piece] | None:
        end = self._nesting.end(self._text, header.end())
        if end is None:
            return self._no_call() if ended else None
        raw = self._text[header.end() : end]
        if not _is_object(raw):
            return self._no_call()
        return self._complete(end, [(header["name"], raw)])

    def _complete(self, end: int, calls: Iterable[tuple[str, str]]) -> list[Piece]:
        self._text, self._at, self._in_list = self._text[end:], _At.AFTER, self._bracket
        pieces: list[Piece] = []
        for index, (name, arguments) in enumerate(calls, self._count):
            pieces += [CallBegins(index, self._new_id(), name), CallArguments(index, arguments)]
            self._count += 1
        return pieces

    def _read_after(self, ended: bool) -> list[Piece] | None:
        form, text = self._form, self._text.lstrip()
        if not text:
            return None
        if self._in_list and text[0] in ",]":
            self._text, self._in_list = text[1:], text[0] == ","
            return self._expect_call("") if self._in_list else []
        if form.separator and text.startswith(form.separator):
            self._text = text[len(form.separator) :]
            return self._expect_call("")
        if form.end and not ended and form.end.startswith(text) and text != form.end:
            return None
        if form.end and text.startswith(form.end):
            self._text = text[len(form.end) :]
        self._at, self._in_list, self._bare = _At.CONTENT, False, form.bare
        return []


class _Nesting:
    """Where a JSON value that begins with a bracket ends. Knows strings, not grammar; goes on
    where it stopped when it is asked again with more text. `depth`: brackets open already."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._quoted = self._escaped = False
        self._seen = 0

    def end(self, text: str, start: int) -> int | None:
        """The index after the value's last character; None while it is open."""
        for place in range(max(start, self._seen), len(text)):
            if self._closes(text[place]):
                return place + 1
        self._seen = len(text)
        return None

    def rebased(self) -> _Nesting:
        """For a text that begins where the last one ended."""
        self._seen = 0
        return self

    def _closes(self, character: str) -> bool:
        if self._quoted:
            self._quoted = self._escaped or character != '"'
            self._escaped = not self._escaped and character == "\\"
        elif character == '"':
            self._quoted = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            return self._depth <= 0
        return False


def _after_space(text: str, start: int) -> int:
    while start < len(text) and text[start].isspace():
        start += 1
    return start


def _decided(text: str, starts: tuple[str, ...]) -> int:
    """How much of `text` no start marker can begin in, the white space before it included."""
    longest = max(map(len, starts)) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-size:]) for s in starts):
            return len(text[:-size].rstrip())
    return len(text.rstrip())


def _object(text: str) -> dict[str, Any]:
    """{} for what is no JSON object."""
    try:
        found = from_json(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_object(text: str) -> bool:
    try:
        return isinstance(from_json(text), dict)
    except (ValueError, RecursionError):
        return False


def _content(text: str) -> list[Piece]:
    return [Content(text)] if text else []


def _tidy(pieces: Iterable[Piece], max_calls: int | None) -> list[Piece]:
    """Neighbours joined, calls beyond the allowed ones left out."""
    tidy: list[Piece] = []
    for piece in pieces:
        if not isinstance(piece, Content) and max_calls is not None and piece.index >= max_calls:
            continue
        last = tidy[-1] if tidy else None
        if isinstance(piece, Content) and isinstance(last, Content):
            tidy[-1] = Content(last.text + piece.text)
        elif isinstance(piece, CallArguments) and isinstance(last, CallArguments):
            tidy[-1] = CallArguments(piece.index, last.text + piece.text)
        else:
            tidy.append(piece)
    return tidy
