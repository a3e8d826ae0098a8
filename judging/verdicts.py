"""Read a verdict out of a judge's words.

A reply with no verdict, or with two that differ, has none: never a tie, never the first.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from preferences.records import Verdict


def letter(reply: str) -> Verdict | None:
    """`A` or `B`, alone or as `[[A]]`; `C`, `tie` or `[[C]]` for a tie.

    A bracketed verdict counts before a bare letter, and a bare letter counts only where the reply
    is nothing else: an `A` inside a sentence is an article more often than a verdict.
    """
    bracketed = re.findall(r"\[\[\s*(A|B|C|tie)\s*\]\]", reply, re.IGNORECASE)
    if bracketed:
        return _only({_LETTERS[b.lower()] for b in bracketed})
    bare = reply.strip().strip("*.:()[]\"'").strip().lower()
    return _LETTERS.get(bare)


def arena_hard(reply: str) -> Verdict | None:
    """`[[A>>B]]`, `[[A>B]]`, `[[A=B]]`, `[[B>A]]` or `[[B>>A]]`, as Arena-Hard's judges reply."""
    found = re.findall(r"\[\[\s*(A\s*(?:>>|>|=|<<|<)\s*B|B\s*(?:>>|>|=|<<|<)\s*A)\s*\]\]", reply)
    return _only({_arena(re.sub(r"\s", "", f)) for f in found})


GRAMMARS: dict[str, Callable[[str], Verdict | None]] = {"letter": letter, "arena_hard": arena_hard}

_LETTERS: dict[str, Verdict] = {"a": "first", "b": "second", "c": "tie", "tie": "tie"}


def _arena(verdict: str) -> Verdict:
    if "=" in verdict:
        return "tie"
    left_wins = ">" in verdict
    return "first" if left_wins == (verdict[0] == "A") else "second"


def _only(verdicts: set[Verdict]) -> Verdict | None:
    return verdicts.pop() if len(verdicts) == 1 else None
