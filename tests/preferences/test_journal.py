"""Calls on record."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preferences.journal import Journal
from preferences.store import Shard, Store

WHOLE = Shard(0, 1)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(tmp_path if request.param == "folder" else f"memory://{uuid.uuid4().hex}")


def put_raw(store: Store, lines: bytes) -> None:
    """A journal file with these bytes, as a process left it."""
    folder = store.path("journal", "model")
    store.fs.makedirs(folder, exist_ok=True)
    store.fs.pipe_file(f"{folder}/00-ff-{uuid.uuid4().hex}.jsonl", lines)


def test_a_reply_is_found_by_the_next_journal(store: Store) -> None:
    reply = {"text": "é\nline \ud83d", "cost": 0.5, "none": None}
    with Journal(store, "model", WHOLE) as journal:
        assert journal.get("k") is None
        journal.put("k", reply)
    with Journal(store, "model", WHOLE) as journal:
        assert journal.get("k") == reply
        assert journal.get("other") is None


def test_another_answerers_replies_are_not_ours(store: Store) -> None:
    with Journal(store, "model", WHOLE) as journal:
        journal.put("k", {"text": "hi"})
    assert Journal(store, "other", WHOLE).get("k") is None


def test_a_torn_journal_line_is_owed_again_wherever_it_was_torn() -> None:
    whole = json.dumps({"key": "a", "reply": {"text": "one"}}).encode()
    torn = json.dumps({"key": "b", "reply": {"text": "deux"}}).encode()
    for cut in range(1, len(torn)):
        store = Store(f"memory://{uuid.uuid4().hex}")
        put_raw(store, whole + b"\n" + torn[:cut])
        journal = Journal(store, "model", WHOLE)
        assert journal.get("a") == {"text": "one"}
        assert journal.get("b") is None


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"null",
        b"[1, 2]",
        b'"key"',
        b'{"key": "b"}',
        b'{"reply": {"text": "x"}}',
        b'{"key": "b", "reply": 3}',
        b'{"key": "b", "reply": "text"}',
        b'{"key": ["b"], "reply": {"text": "x"}}',
        b'{"key": {"b": 1}, "reply": {"text": "x"}}',
        b"\xff\xfe\x00",
        b"{" * 40,
    ],
)
def test_a_malformed_line_is_owed_again_and_hides_no_other(store: Store, line: bytes) -> None:
    good = [json.dumps({"key": k, "reply": {"text": k}}).encode() for k in ("a", "c")]
    put_raw(store, b"\n".join([good[0], line, good[1]]) + b"\n")
    journal = Journal(store, "model", WHOLE)
    assert [journal.get(k) for k in ("a", "b", "c")] == [{"text": "a"}, None, {"text": "c"}]


@settings(max_examples=60, deadline=None)
@given(st.lists(JSON | st.fixed_dictionaries({"key": JSON, "reply": JSON}), max_size=4))
def test_no_line_of_json_keeps_a_journal_from_opening(lines: list[Any]) -> None:
    store = Store(f"memory://{uuid.uuid4().hex}")
    good = {"key": "a good key", "reply": {"text": "x"}}
    put_raw(store, "\n".join(json.dumps(line) for line in [*lines, good]).encode())
    assert Journal(store, "model", WHOLE).get("a good key") == {"text": "x"}


@pytest.mark.parametrize("count", [1, 2, 4, 16])
def test_other_shard_cuts_find_the_same_replies(store: Store, count: int) -> None:
    keys = {value: f"call of a prompt that begins with {value:02x}" for value in range(0, 256, 5)}
    for index in range(4):
        shard = Shard(index, 4)
        with Journal(store, "model", shard) as journal:
            for value, key in keys.items():
                if f"{value:02x}" in shard:
                    journal.put(key, {"value": value})
    for index in range(count):
        shard = Shard(index, count)
        journal = Journal(store, "model", shard)
        for value, key in keys.items():
            if f"{value:02x}" in shard:
                assert journal.get(key) == {"value": value}


def test_a_shard_does_not_read_the_files_of_others(store: Store) -> None:
    with Journal(store, "model", Shard(0, 4)) as journal:
        journal.put("k", {"text": "hi"})
    assert Journal(store, "model", Shard(1, 4)).get("k") is None


def test_two_journals_at_once_write_files_of_their_own(store: Store) -> None:
    with Journal(store, "model", WHOLE) as one, Journal(store, "model", WHOLE) as other:
        for number in range(20):
            (one, other)[number % 2].put(str(number), {"n": number})
    journal = Journal(store, "model", WHOLE)
    assert [journal.get(str(n)) for n in range(20)] == [{"n": n} for n in range(20)]


_WRITER = """
import os, signal, sys
from preferences.journal import Journal
from preferences.store import Shard, Store
journal = Journal(Store(sys.argv[1]), "model", Shard(0, 1))
journal.put("k", {"text": "hi"})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_reply_outlives_the_process_that_was_killed_right_after_it(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _WRITER, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert Journal(Store(tmp_path), "model", WHOLE).get("k") == {"text": "hi"}
