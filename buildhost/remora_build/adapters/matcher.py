"""A program of its own, started by `budget`: matches regular expressions that come from outside,
and ends when they have taken too long. Needs the standard library only.

    stdin, a JSON array a line   stdout, a JSON array a line
    [how, [pattern, …]]          (none: from now on list 0, 1, …; how: "match" or "fullmatch")
    [list, text]                 [index of the first pattern that matches, or null; its group idx]
                                 [index of the pattern that is none, null, what is wrong with it]
"""

from __future__ import annotations

import json
import re
import signal
import sys
from functools import cache
from typing import Any

_compiled = cache(re.compile)  # re keeps 512, a list may be longer


def main() -> None:
    # Of the processor, so that a busy machine matches as much. Nothing handles the signal, so it
    # ends the program in the midst of a match.
    signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_VIRTUAL, float(sys.argv[1]))
    lists: list[tuple[str, list[str]]] = []
    for line in sys.stdin:
        what, value = json.loads(line)
        if isinstance(what, str):
            lists.append((what, value))
        else:
            sys.stdout.write(json.dumps(_first(value, *lists[what])) + "\n")
            sys.stdout.flush()


def _first(text: str, how: str, patterns: list[str]) -> list[Any]:
    for index, pattern in enumerate(patterns):
        try:
            match = getattr(_compiled(pattern), how)(text)
        except (re.error, RecursionError, OverflowError) as e:
            return [index, None, str(e)]
        if match is not None:
            return [index, match.groupdict().get("idx")]
    return [None, None]


if __name__ == "__main__":
    main()
