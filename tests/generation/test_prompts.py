"""Prompts that are kept, and those that are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from generation.prompts import Decontamination, PromptsConfig, load_prompts
from preferences.errors import InputError
from preferences.records import Dropped, Prompt

FOX = "the quick brown fox jumps over the lazy dog and runs far away from here today"


def table(path: Path, *prompts: str | dict[str, Any]) -> str:
    rows = [p if isinstance(p, dict) else {"prompt": p} for p in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def loaded(config: PromptsConfig) -> tuple[list[str], list[tuple[str, str]]]:
    """The last messages kept, and reason and detail of each drop."""
    rows = list(load_prompts(config))
    kept = [p.messages[-1].content for p in rows if isinstance(p, Prompt)]
    return kept, [(d.reason, d.detail) for d in rows if isinstance(d, Dropped)]


def test_an_equal_prompt_is_dropped_with_what_it_equals(tmp_path: Path) -> None:
    source = table(tmp_path / "p.jsonl", "Why?", "How?", "Why?", "Why?")
    rows = list(load_prompts(PromptsConfig(source=source)))
    assert [p.messages[0].content for p in rows if isinstance(p, Prompt)] == ["Why?", "How?"]
    drops = [d for d in rows if isinstance(d, Dropped)]
    assert [d.detail for d in drops] == ["equal to p.jsonl:1"] * 2
    # Two removed copies are two records.
    assert len({d.record_id for d in drops}) == 2


def test_a_near_duplicate_names_what_it_is_near_to(tmp_path: Path) -> None:
    # 16 words are 14 runs of three. Another last word changes one: 13 shared of 15, 0.87.
    near = FOX.replace("today", "tomorrow")
    source = table(tmp_path / "p.jsonl", FOX, near, "something else altogether, please")
    kept, drops = loaded(PromptsConfig(source=source, near_duplicates=0.8))
    assert kept == [FOX, "something else altogether, please"]
    assert drops == [("near_duplicate", "0.87 similar to p.jsonl:1")]
    assert loaded(PromptsConfig(source=source, near_duplicates=0.9))[1] == []
    assert loaded(PromptsConfig(source=source))[1] == []


def test_prompts_without_words_are_not_alike(tmp_path: Path) -> None:
    source = table(tmp_path / "p.jsonl", "😀 + 😀", "???", "{}[]")
    kept, drops = loaded(PromptsConfig(source=source, near_duplicates=0.8))
    assert drops == []
    assert len(kept) == 3


def test_a_prompt_without_words_contaminates_nothing(tmp_path: Path) -> None:
    tests = table(tmp_path / "test.jsonl", "???")
    source = table(tmp_path / "p.jsonl", "{}[]", "Why?")
    config = PromptsConfig(source=source, decontamination=Decontamination(against=(tests,)))
    assert loaded(config) == (["{}[]", "Why?"], [])


def test_a_prompt_that_shares_a_run_with_the_test_set_is_removed(tmp_path: Path) -> None:
    tests = table(tmp_path / "test.jsonl", f"Say: {FOX.upper()}!", "What is two and two?")
    longer = f"Please explain. {FOX} And thank you."
    shorter = "What is two and two, and three?"
    source = table(tmp_path / "p.jsonl", longer, "what IS two and two", shorter)
    config = PromptsConfig(source=source, decontamination=Decontamination(against=(tests,)))
    kept, drops = loaded(config)
    assert kept == [shorter]
    first_run = " ".join(FOX.split()[:13])
    assert drops == [
        ("contaminated", f"shares {first_run[:80]!r} with test.jsonl:1"),
        ("contaminated", "shares 'what is two and two' with test.jsonl:2"),
    ]


def test_too_short_and_too_long_are_told_with_their_length(tmp_path: Path) -> None:
    source = table(tmp_path / "p.jsonl", "ab", "abc", "abcde", "abcdef")
    config = PromptsConfig(source=source, min_characters=3, max_characters=5)
    assert loaded(config) == (
        ["abc", "abcde"],
        [("too_short", "2 characters"), ("too_long", "6 characters")],
    )


def test_the_limit_is_in_rows_of_the_table(tmp_path: Path) -> None:
    source = table(tmp_path / "p.jsonl", "a", "a", "b", "c")
    kept, drops = loaded(PromptsConfig(source=source, limit=3))
    assert (kept, len(drops)) == (["a", "b"], 1)


def test_an_id_that_stands_for_two_prompts_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "Why?", "prompt_id": 1}, {"prompt": "How?", "prompt_id": 1}]
    source = table(tmp_path / "p.jsonl", *rows)
    with pytest.raises(InputError, match=r"p\.jsonl:2: id '1' already stands .*\(p\.jsonl:1\)"):
        loaded(PromptsConfig(source=source))
    source = table(tmp_path / "q.jsonl", rows[0], rows[0])
    assert loaded(PromptsConfig(source=source))[1] == [("duplicate", "equal to q.jsonl:1")]


def test_the_system_prompt_tells_two_prompts_apart_and_survives(tmp_path: Path) -> None:
    turns = [[{"role": "system", "content": s}, {"role": "user", "content": "Why?"}] for s in "ab"]
    source = table(tmp_path / "p.jsonl", *({"messages": t} for t in turns))
    rows = list(load_prompts(PromptsConfig(source=source)))
    assert [[m.content for m in p.messages] for p in rows if isinstance(p, Prompt)] == [
        ["a", "Why?"],
        ["b", "Why?"],
    ]


def test_a_bad_line_names_its_number(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "Why?"}\n{"prompt": \n')
    with pytest.raises(InputError, match=r"p\.jsonl:2: not JSON"):
        loaded(PromptsConfig(source=str(path)))
