"""Questions whose right answer is known. They are mixed among the others and measure people."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from judging.people import Question, question
from preferences.conversations import PromptColumns, prompt_from_row
from preferences.errors import InputError
from preferences.fingerprint import fingerprint
from preferences.records import Candidate, Prompt
from preferences.tables import read_rows, text_column


@dataclass(frozen=True, slots=True)
class Gold:
    """A question, and the id of the candidate that everybody ought to prefer."""

    question: Question
    better: str


def read_gold(source: str) -> Iterator[Gold]:
    """The rows of a table: `prompt` or `messages`, and two texts, `chosen` and `rejected`.

    Raises InputError at a row that cannot be such a question.
    """
    for place, row in read_rows(source):
        prompt = prompt_from_row(row, PromptColumns(), place)
        names = ("chosen", "rejected")
        pair = [_candidate(prompt, name, text_column(row, name, place)) for name in names]
        if pair[0].response.split() == pair[1].response.split():
            raise InputError(
                f"{place}: chosen and rejected say the same, so neither is better; remove the row"
            )
        yield Gold(question(prompt, pair, "gold"), pair[0].candidate_id)


def _candidate(prompt: Prompt, name: str, text: str) -> Candidate:
    identity = fingerprint(["gold", prompt.prompt_id, text])
    return Candidate(identity, prompt.prompt_id, name, text, "complete")
