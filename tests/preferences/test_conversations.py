"""Conversations from rows, lists and transcripts."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preferences.conversations import (
    PairColumns,
    PromptColumns,
    pair_from_row,
    parse_transcript,
    prompt_from_row,
)
from preferences.errors import InputError
from preferences.records import Message, Messages

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Why?"},
]
AS_MESSAGES: Messages = tuple(Message(t["role"], t["content"]) for t in TURNS)


@pytest.mark.parametrize(
    "row",
    [{"messages": TURNS}, {"messages": json.dumps(TURNS)}, {"prompt": TURNS}],
    ids=["messages", "json", "prompt column"],
)
def test_many_turns_and_the_system_prompt_survive(row: dict[str, Any]) -> None:
    assert prompt_from_row(row, PromptColumns(), "t:1").messages == AS_MESSAGES


def test_a_text_is_one_user_turn_kept_as_it_stands() -> None:
    row = {"prompt": " Why?\n", "prompt_id": 7, "category": "c", "reference": "42", "more": 1}
    prompt = prompt_from_row(row, PromptColumns(), "t.jsonl:3")
    assert prompt.messages == (Message("user", " Why?\n"),)
    assert (prompt.source, prompt.source_id) == ("t.jsonl:3", "7")
    assert (prompt.category, prompt.reference) == ("c", "42")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": " \n"}, "t:1: the prompt is empty; remove the row"),
        ({"messages": []}, "t:1: the prompt is empty"),
        ({"prompt": None}, "column 'prompt' holds NoneType"),
        ({"promt": "x"}, "no column 'prompt' or 'messages'.*did you mean 'promt'"),
        ({"messages": TURNS[:3]}, "ends with the assistant, not with the user"),
        ({"messages": "Hi"}, "the messages are not JSON"),
        ({"messages": {"role": "user"}}, "the messages are a dict; a list is needed"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "message 1 needs a role"),
        ({"messages": [TURNS[0], {"role": "user", "content": None}]}, "message 2 needs a role"),
        ({"messages": [TURNS[0], "Hi"]}, "message 2 needs a role"),
    ],
)
def test_a_row_that_is_no_prompt_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prompt_from_row(row, PromptColumns(), "t:1")


# Transcripts


def test_a_transcript_is_read_turn_by_turn() -> None:
    text = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nWhat: now?\n\nHuman: Why?\n\nAssistant:"
    assert parse_transcript(text, "t:1") == (
        Message("user", "Hi"),
        Message("assistant", "Hello!\n\nWhat: now?"),
        Message("user", "Why?"),
        Message("assistant", ""),
    )


def test_a_speaker_named_twice_in_a_row_has_one_turn() -> None:
    text = "\n\nHuman: Hi\n\nHuman: there\n\nAssistant: Well\n\nAssistant: yes"
    found = parse_transcript(text, "t:1")
    assert found == (Message("user", "Hi\n\nthere"), Message("assistant", "Well\n\nyes"))


@pytest.mark.parametrize("text", ["", "Hello", "Preface\n\nHuman: Hi\n\nAssistant: Hello"])
def test_what_is_no_transcript_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="it has to begin with 'Human: '"):
        parse_transcript(text, "t:1")


SAID = st.text("abc .:\n", min_size=1, max_size=12).map(str.strip).filter(bool)


@given(st.lists(SAID, min_size=1, max_size=5))
def test_every_turn_of_a_transcript_comes_back(said: list[str]) -> None:
    roles = ["user" if n % 2 == 0 else "assistant" for n in range(len(said))]
    names = {"user": "Human", "assistant": "Assistant"}
    text = "".join(f"\n\n{names[r]}: {s}" for r, s in zip(roles, said, strict=True))
    assert parse_transcript(text, "t:1") == tuple(map(Message, roles, said))


# Pairs


def test_a_pair_of_transcripts_is_its_shared_turns_and_two_answers() -> None:
    shared = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: "
    row = {"chosen": shared + "Because.", "rejected": shared + "Go away."}
    prompt, better, worse = pair_from_row(row, PairColumns(), "hh.jsonl.gz:1", transcripts=True)
    assert [m.content for m in prompt.messages] == ["Hi", "Hello", "Why?"]
    assert (better.response, worse.response) == ("Because.", "Go away.")
    assert better.model == worse.model == "hh"
    assert better.prompt_id == worse.prompt_id == prompt.prompt_id


def test_a_pair_of_conversations_and_a_pair_of_texts_are_the_same_pair() -> None:
    def answered(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": text}]

    models = {"chosen_model": "m", "rejected_model": "n"}
    whole = {"chosen": answered("yes"), "rejected": answered("no"), **models}
    ends = {"prompt": "Why?", "chosen": answered("yes")[1:], "rejected": answered("no")[1:]}
    texts = {"prompt": "Why?", "chosen": "yes", "rejected": "no", **models}
    found = [pair_from_row(r, PairColumns(), "t:1", False) for r in (whole, ends | models, texts)]
    assert found[0] == found[1] == found[2]
    assert [c.model for c in found[0][1:]] == ["m", "n"]


def test_transcripts_that_differ_before_the_answer_are_refused() -> None:
    row = {
        "chosen": "\n\nHuman: Hi\n\nAssistant: yes",
        "rejected": "\n\nHuman: Ho\n\nAssistant: no",
    }
    with pytest.raises(InputError, match="t:1: the two conversations differ before their last"):
        pair_from_row(row, PairColumns(), "t:1", transcripts=True)
    row = {"chosen": row["chosen"], "rejected": "\n\nHuman: Hi"}
    with pytest.raises(InputError, match="ends with the user, not with an answer"):
        pair_from_row(row, PairColumns(), "t:1", transcripts=True)


def test_a_pair_of_empty_conversations_is_named() -> None:
    with pytest.raises(InputError, match="t:1"):
        pair_from_row({"prompt": "x", "chosen": [], "rejected": []}, PairColumns(), "t:1", False)


def test_a_missing_side_suggests_the_right_column() -> None:
    with pytest.raises(InputError, match="no column 'rejected'; did you mean 'reject'"):
        pair_from_row({"chosen": "a", "reject": "b"}, PairColumns(), "t:1", False)
