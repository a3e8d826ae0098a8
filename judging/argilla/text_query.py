"""What people type into Argilla's search field, as SQLite's FTS5 is asked for it.

Words are looked for together, `"a phrase"` as it stands, `-word` must be missing, `begin*` is a
prefix, and `|` separates alternatives.

Runs inside the Argilla server, so it imports nothing of Pairwright.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

WORDS = "unicode61 remove_diacritics 2 categories 'L* N* M* Co'"
"""Letters with their marks, which many scripts need, and digits; café is found by cafe."""
EVERY = "\ue000"
"""A word that each row has in the column `everything`, so that `-word` alone can be answered."""
IDEOGRAPHS = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")
"""Written without spaces, each is a word of its own."""
TAG = re.compile(r"</?[A-Za-z][^<>]*>")
TERM = re.compile(r'(?P<minus>-?)(?:"(?P<phrase>[^"]*)"|(?P<word>[^\s"|]+))|(?P<bar>\|)')


def match_expression(query: str, field: str | None = None) -> str | None:
    """What FTS5 is asked for a query, in one field or in all; None if there is no word in it."""
    alternatives = [_alternative(part) for part in _split_alternatives(query)]
    asked = " OR ".join(f"({alternative})" for alternative in alternatives if alternative)
    if not asked:
        return None
    return f"{{{column_of(field)} everything}} : ({asked})" if field else asked


def _split_alternatives(query: str) -> list[list[re.Match[str]]]:
    parts: list[list[re.Match[str]]] = [[]]
    for term in TERM.finditer(query):
        if term["bar"]:
            parts.append([])
        else:
            parts[-1].append(term)
    return parts


def _alternative(terms: Iterable[re.Match[str]]) -> str:
    wanted: list[str] = []
    unwanted: list[str] = []
    for term in terms:
        text = words(term["phrase"] if term["word"] is None else term["word"])
        if not any(unicodedata.category(c)[0] in "LNM" for c in text):
            continue
        prefix = " *" if term["word"] and term["word"].endswith("*") else ""
        (unwanted if term["minus"] else wanted).append(f'"{text}"{prefix}')
    if not wanted and not unwanted:
        return ""
    found = " AND ".join(wanted) or f'"{EVERY}"'
    return f"({found}) NOT ({' OR '.join(unwanted)})" if unwanted else found


def column_of(field: str) -> str:
    """The column of the text index that holds a record's field."""
    return f'"field_{field}"'  # FTS5 keeps some names to itself.


def text_of(value: Any) -> str:
    """The words of a field: a text, a chat's messages, or whatever a custom field holds."""
    if isinstance(value, dict):
        chat = set(value) == {"role", "content"}
        if chat:
            return text_of(value["content"])
        # A custom field holds HTML, of which people see the words.
        return html.unescape(TAG.sub(" ", text_of(list(value.values()))))
    if isinstance(value, list):
        return "\n".join(map(text_of, value))
    return "" if value is None else str(value)


def words(text: str) -> str:
    """Text as SQLite can take it, with every ideograph a word."""
    whole = text.encode("utf-8", "replace").decode().replace("\0", " ").replace(EVERY, " ")
    return IDEOGRAPHS.sub(r" \1 ", whole)
