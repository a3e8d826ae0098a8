"""Random records of a dataset, and what a search must find among them, by looking at each."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

USERS = ("owner", "admin", "annotator")
LABELS = ("first", "second", "tie")
TOPICS = ("maths", "code", "law and order", "Größe")
VOCABULARY = (
    *("red", "redder", "reddest", "green", "blue", "deep", "sea", "42", "don't", "naïve", "Straße"),
    *("हिन्दी", "שלום", "你好", "世界", "user", "assistant", "all", "everything", "NOT", "OR"),
)
MIN_SUBMITTED = 2
LETTER = r"[^\W_\u4e00-\u9fff]|[\u0900-\u0903\u093a-\u094f]"  # with the vowel signs of Devanagari
WORD = re.compile(rf"[\u4e00-\u9fff]|(?:{LETTER})+")
Scope = Mapping[str, Any]


@dataclass
class Row:
    """A record as it was sent, with what Argilla must have made of it."""

    fields: dict[str, Any]
    metadata: dict[str, Any]
    suggestions: dict[str, dict[str, Any]]
    responses: dict[str, dict[str, Any]]
    """By the name of the user."""
    vector: list[float] | None
    external_id: str
    id: str = ""
    inserted_at: str = ""
    updated_at: str = ""
    texts: dict[str, list[str]] = field(default_factory=dict)
    """The words of each field, in order."""

    @property
    def status(self) -> str:
        submitted = sum(r["status"] == "submitted" for r in self.responses.values())
        return "completed" if submitted >= MIN_SUBMITTED else "pending"


def random_row(rng: random.Random, number: int) -> Row:
    """A record of which anything that may be missing sometimes is."""

    def sometimes(value: Any, share: float = 0.7) -> Any:
        return value if rng.random() < share else None

    def sentence() -> str:
        return " ".join(rng.choices(VOCABULARY, k=rng.randint(1, 8)))

    chat = [{"role": "user", "content": sentence()}, {"role": "assistant", "content": sentence()}]
    fields = {"prompt": sentence(), "answer": sometimes(sentence()), "talk": sometimes(chat)}
    metadata = {
        "topic": sometimes(rng.choice(TOPICS)),
        "tags": sometimes(rng.sample(TOPICS, rng.randint(1, 3))),
        "length": sometimes(rng.randint(-3, 12)),
        "margin": sometimes(rng.randint(-8, 8) / 4),
    }
    suggestions = {
        "better": sometimes({"value": rng.choice(LABELS), "agent": rng.choice(("judge", "rule"))}),
        "stars": sometimes({"value": rng.randint(1, 5), "score": rng.randint(0, 8) / 8}),
    }
    responses = {}
    for user in USERS:
        status = rng.choice(("draft", "submitted", "submitted", "discarded"))
        values = {"better": rng.choice(LABELS), "stars": rng.randint(1, 5)}
        responses[user] = sometimes({"status": status, "values": values}, 0.5)
    row = Row(
        fields=_present(fields),
        metadata=_present(metadata),
        suggestions=_present(suggestions),
        responses=_present(responses),
        vector=sometimes([rng.randint(-3, 3) + 0.5 for _ in range(4)]),
        external_id=f"record-{number:04}",
    )
    row.texts = {name: words_of(value) for name, value in row.fields.items()}
    return row


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def words_of(value: Any) -> list[str]:
    """The words of a text or of a chat: lower case, without accents, each ideograph a word."""
    if isinstance(value, list):
        return [word for turn in value for word in words_of(turn["content"])]
    plain = unicodedata.normalize("NFD", str(value).lower())
    # Only Latin accents are dropped; in other scripts a mark is part of its word.
    plain = re.sub("[\u0300-\u036f]", "", plain)
    return re.findall(
        r"[\u4e00-\u9fff]|[^\W_\u4e00-\u9fff](?:[^\W_\u4e00-\u9fff]|\u0940|\u093f|\u094d)*", plain
    )


def passes(row: Row, condition: Mapping[str, Any], user: str | None) -> bool:
    """Whether a record passes a filter, for one user's responses or for everybody's."""
    scope = condition["scope"]
    values = values_of(row, scope, user)
    if condition["type"] == "range":
        low, high = condition.get("ge", values), condition.get("le", values)
        above = [v for v in values if low is values or v >= low]
        return any(high is values or v <= high for v in above)
    if scope.get("property") == "status" and scope["entity"] == "response":
        answered = [user] if user in row.responses else [] if user else list(row.responses)
        if "pending" in condition["values"] and not answered:
            return True
    return any(str(value) in condition["values"] for value in values)


def values_of(row: Row, scope: Scope, user: str | None) -> list[Any]:
    """The values that a record has in a scope: none, one, or several."""
    if scope["entity"] == "record":
        return [getattr(row, scope["property"])]
    if scope["entity"] == "metadata":
        return _listed(row.metadata.get(scope["metadata_property"]))
    if scope["entity"] == "suggestion":
        suggestion = row.suggestions.get(scope["question"], {})
        return _listed(suggestion.get(scope.get("property", "value")))
    given = [r for name, r in row.responses.items() if user in (None, name)]
    if scope.get("question"):
        return [response["values"][scope["question"]] for response in given]
    return [response["status"] for response in given]


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def sort_key(row: Row, scope: Scope, order: str, user: str | None) -> Any:
    """What a record is sorted by: None if it has no value, and then it comes last."""
    values = values_of(row, scope, user)
    if not values:
        return None
    if scope["entity"] == "response" and not isinstance(values[0], str):
        return sum(values) / len(values)
    return max(values) if order == "desc" else min(values)


def sorted_keys(rows: Sequence[Row], scope: Scope, order: str, user: str | None) -> list[Any]:
    """The keys of all records in the order they must come in."""
    keys = [sort_key(row, scope, order, user) for row in rows]
    there = sorted((key for key in keys if key is not None), reverse=order == "desc")
    return there + [None] * (len(keys) - len(there))


@dataclass(frozen=True)
class Term:
    """A part of a text query."""

    words: tuple[str, ...]
    unwanted: bool = False
    prefix: bool = False

    def __str__(self) -> str:
        text = f'"{" ".join(self.words)}"' if len(self.words) > 1 else self.words[0]
        return "-" * self.unwanted + text + "*" * self.prefix

    def fits(self, texts: Mapping[str, list[str]]) -> bool:
        found = any(self._in(words) for words in texts.values())
        return found != self.unwanted

    def _in(self, words: Sequence[str]) -> bool:
        wanted = [word for part in self.words for word in words_of(part)]
        for start in range(len(words) - len(wanted) + 1):
            held = list(words[start : start + len(wanted)])
            if held[:-1] == wanted[:-1] and (
                held[-1].startswith(wanted[-1]) if self.prefix else held[-1] == wanted[-1]
            ):
                return True
        return False


def random_term(rng: random.Random) -> Term:
    """A word, a phrase, an unwanted word or the beginning of one."""
    kind = rng.choice(("word", "word", "phrase", "unwanted", "prefix"))
    if kind == "phrase":
        return Term(tuple(rng.choices(VOCABULARY, k=2)))
    if kind == "prefix":
        return Term((rng.choice(("re", "red", "gr", "de", "na", "stra")),), prefix=True)
    return Term((rng.choice(VOCABULARY),), unwanted=kind == "unwanted")


def fits(row: Row, query: Sequence[Sequence[Term]], only: str | None) -> bool:
    """Whether a record fits one of the alternatives of a query, in one field or in all."""
    texts = {name: words for name, words in row.texts.items() if only in (None, name)}
    return any(all(term.fits(texts) for term in alternative) for alternative in query)
