"""Read a verdict out of a judge's words.

A reply with no verdict, or with two that differ, has none: never a tie, never the first.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from preferences.records import Verdict

Order = tuple[tuple[str, ...], ...]
"""Labels from the best to the worst; those that are as good as each other stand together."""


def letter(reply: str) -> Verdict | None:
    """`A` or `B`, alone or as `[[A]]`; `C`, `tie` or `[[C]]` for a tie.

    A bracketed verdict counts before a bare letter, wherever it stands, and a bare letter counts
    only where the reply is nothing else: an `A` inside a sentence is an article more often than a
    verdict.
    """
    bracketed = _BRACKETED.findall(reply)
    if bracketed:
        return _only({_LETTERS[b.lower()] for b in bracketed})
    return alone(reply)


def alone(reply: str) -> Verdict | None:
    """A letter, bare or bracketed, or `tie`, that is all the reply says."""
    return _LETTERS.get(_bare(reply).lower())


def final(reply: str) -> Verdict | None:
    """`[[A]]` or `[[B]]`, `[[C]]` or `[[tie]]` for a tie, at the end of a reply that reasons first.

    It stands on the last line that is not blank, with nothing before it but words as "Final
    verdict:". What the reasoning quotes from an answer, there or elsewhere, is no verdict.
    """
    found = _FINAL.fullmatch(_last_line(reply))
    return _LETTERS[found[1].lower()] if found else None


def arena_hard(reply: str) -> Verdict | None:
    """`[[A>>B]]`, `[[A>B]]`, `[[A=B]]`, `[[B>A]]` or `[[B>>A]]`, as Arena-Hard's judges reply."""
    found = re.findall(r"\[\[\s*(A\s*(?:>>|>|=|<<|<)\s*B|B\s*(?:>>|>|=|<<|<)\s*A)\s*\]\]", reply)
    return _only({_arena(re.sub(r"\s", "", f)) for f in found})


def score(reply: str) -> int | None:
    """A digit from 1 to 5 that is all the reply says."""
    return _SCORES.get(_bare(reply))


def order(reply: str, labels: str) -> Order | None:
    """`B > A = C` on the last line that is not blank, alone there, with each label exactly once."""
    line = _last_line(reply).strip(" \t*_`.")
    if not re.fullmatch(r"[A-Z](?:\s*[>=]\s*[A-Z])*", line):
        return None
    if sorted(re.findall("[A-Z]", line)) != sorted(labels):
        return None
    return tuple(tuple(re.findall("[A-Z]", tier)) for tier in line.split(">"))


GRAMMARS: dict[str, Callable[[str], Verdict | None]] = {
    "letter": letter,
    "final": final,
    "arena_hard": arena_hard,
}

# ASCII: without it `ı`, the dotless i, is an `i` in another case.
_BRACKETED = re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\]", re.IGNORECASE | re.ASCII)
_LETTERS: dict[str, Verdict] = {"a": "first", "b": "second", "c": "tie", "tie": "tie"}
_SCORES = {str(n): n for n in range(1, 6)}
# Quotation marks are not among what may surround it: a quotation is no verdict.
_FINAL = re.compile(
    r"[\s*_`#]*"
    r"(?:(?:so|thus|therefore|my|the|final|overall|verdict|judge?ment|decision|answer|is)"
    r"(?![a-z])[\s*_`:,–-]*)*"
    r"\[\[\s*(A|B|C|tie)\s*\]\][\s*_`.!]*",
    re.IGNORECASE | re.ASCII,
)


def _bare(text: str) -> str:
    return text.strip().strip("*.:()[]\"'").strip()


def _last_line(reply: str) -> str:
    # Other separators of lines, as U+2028, do not hide what stands before them on the line.
    return re.split(r"[\r\n]", reply.rstrip())[-1]


def _arena(verdict: str) -> Verdict:
    if "=" in verdict:
        return "tie"
    left_wins = ">" in verdict
    return "first" if left_wins == (verdict[0] == "A") else "second"


def _only(verdicts: set[Verdict]) -> Verdict | None:
    return verdicts.pop() if len(verdicts) == 1 else None
