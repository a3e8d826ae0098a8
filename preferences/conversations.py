"""Conversations as people write them down: a string, a list of messages, a transcript."""

from __future__ import annotations

import json
import re
from typing import Any

from preferences.config import Config
from preferences.errors import InputError
from preferences.fingerprint import fingerprint
from preferences.records import Candidate, Message, Messages, Prompt, Status, prompt_identity
from preferences.tables import Row, column, suggestion, text_column

ROLES = ("system", "user", "assistant", "tool")


class PromptColumns(Config):
    """Which columns of a table hold what. A row has either the prompt or the messages."""

    prompt: str = "prompt"
    """The prompt as one text."""
    messages: str = "messages"
    """The conversation up to the answer: a list of `role` and `content`, or the same as JSON."""
    prompt_id: str = "prompt_id"
    """The table's own id for the prompt, by which imported answers and judgments refer to it."""
    category: str = "category"
    """A kind of prompt, by which reports are broken down."""
    reference: str = "reference"
    """The known right answer, for verifiers."""


def prompt_from_row(row: Row, columns: PromptColumns, place: str) -> Prompt:
    """The prompt of one row; raises InputError if it is missing, empty or malformed."""
    if row.get(columns.messages) is not None:
        messages = parse_messages(row[columns.messages], place)
    elif columns.prompt in row:
        value = row[columns.prompt]
        if isinstance(value, list):
            messages = parse_messages(value, place)
        else:
            messages = (Message("user", text_column(row, columns.prompt, place)),)
    else:
        raise InputError(
            f"{place}: no column {columns.prompt!r} or {columns.messages!r}; map one with "
            f"`columns:`; {suggestion(columns.prompt, row)}"
        )
    return make_prompt(
        messages,
        place,
        source_id=_optional_text(row, columns.prompt_id),
        category=_optional_text(row, columns.category),
        reference=_optional_text(row, columns.reference),
    )


def make_prompt(
    messages: Messages,
    place: str,
    source_id: str | None = None,
    category: str | None = None,
    reference: str | None = None,
) -> Prompt:
    """A prompt with its identity; raises InputError if nobody can answer it."""
    if not messages or not messages[-1].content.strip():
        raise InputError(f"{place}: the prompt is empty; remove the row")
    if messages[-1].role not in ("user", "tool"):
        raise InputError(
            f"{place}: the conversation ends with the {messages[-1].role}, not with the user"
        )
    return Prompt(prompt_identity(messages), messages, place, source_id, category, reference)


def parse_messages(value: Any, place: str) -> Messages:
    """A conversation from a list of role/content objects, or from its JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise InputError(f"{place}: the messages are not JSON ({error})") from error
    if not isinstance(value, list):
        raise InputError(f"{place}: the messages are a {type(value).__name__}; a list is needed")
    messages = []
    for number, turn in enumerate(value, 1):
        role = turn.get("role") if isinstance(turn, dict) else None
        content = turn.get("content") if isinstance(turn, dict) else None
        if role not in ROLES or not isinstance(content, str):
            raise InputError(
                f"{place}: message {number} needs a role ({', '.join(ROLES)}) and a text as content"
            )
        messages.append(Message(role, content))
    return tuple(messages)


_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")


def parse_transcript(text: str, place: str) -> Messages:
    r"""A conversation from an HH-RLHF transcript: `\n\nHuman: … \n\nAssistant: …`.

    A speaker who is named twice in a row has one turn: some answers there name themselves again.
    """
    pieces = _TURN.split(text)
    if len(pieces) < 3 or pieces[0].strip():
        raise InputError(f"{place}: not a transcript; it has to begin with 'Human: '")
    turns: list[Message] = []
    for speaker, said in zip(pieces[1::2], pieces[2::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if turns and turns[-1].role == role:
            turns[-1] = Message(role, f"{turns[-1].content}\n\n{said.strip()}".strip())
        else:
            turns.append(Message(role, said.strip()))
    return tuple(turns)


def split_answers(chosen: Messages, rejected: Messages, place: str) -> tuple[Messages, str, str]:
    """Two whole conversations as the turns they share and the answer each ends with."""
    for messages in (chosen, rejected):
        if not messages or messages[-1].role != "assistant":
            raise InputError(f"{place}: a conversation ends with the user, not with an answer")
    if chosen[:-1] != rejected[:-1]:
        raise InputError(f"{place}: the two conversations differ before their last answer")
    return chosen[:-1], chosen[-1].content, rejected[-1].content


class PairColumns(PromptColumns):
    """Columns of a preference table: a prompt and two answers, of which one is better."""

    chosen: str = "chosen"
    """The better answer: a text, or messages that end with it."""
    rejected: str = "rejected"
    """The worse one."""
    chosen_model: str = "chosen_model"
    """Who wrote the better answer; without the column, the table's name stands for both."""
    rejected_model: str = "rejected_model"


def pair_from_row(
    row: Row, columns: PairColumns, place: str, transcripts: bool
) -> tuple[Prompt, Candidate, Candidate]:
    """The prompt, the better and the worse answer of one row of a preference table."""
    chosen, rejected = column(row, columns.chosen, place), column(row, columns.rejected, place)
    if transcripts:
        messages, better, worse = split_answers(
            parse_transcript(text_column(row, columns.chosen, place), place),
            parse_transcript(text_column(row, columns.rejected, place), place),
            place,
        )
        prompt = make_prompt(messages, place, source_id=_optional_text(row, columns.prompt_id))
    elif isinstance(chosen, list):
        better_turns, worse_turns = parse_messages(chosen, place), parse_messages(rejected, place)
        messages, better, worse = split_answers(better_turns, worse_turns, place)
        prompt = (
            make_prompt(messages, place, source_id=_optional_text(row, columns.prompt_id))
            if messages
            else prompt_from_row(row, columns, place)
        )
    else:
        better = text_column(row, columns.chosen, place)
        worse = text_column(row, columns.rejected, place)
        prompt = prompt_from_row(row, columns, place)
    table = place.rpartition(":")[0].split(".")[0]
    return (
        prompt,
        imported_candidate(prompt, _optional_text(row, columns.chosen_model) or table, better),
        imported_candidate(prompt, _optional_text(row, columns.rejected_model) or table, worse),
    )


def imported_candidate(
    prompt: Prompt, model: str, response: str, response_id: str | None = None
) -> Candidate:
    """An answer from a table. Equal answers by one model to a prompt are one candidate."""
    identity = fingerprint([prompt.prompt_id, "imported", model, response_id, response])
    status: Status = "complete" if response.strip() else "empty"
    return Candidate(
        identity, prompt.prompt_id, model, response, status=status, source_id=response_id
    )


def _optional_text(row: Row, name: str) -> str | None:
    value = row.get(name)
    return None if value is None else str(value)
