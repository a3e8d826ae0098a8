"""Content identity."""

from __future__ import annotations

import hashlib
import io
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preferences.config import Config
from preferences.fingerprint import canonical_json, file_fingerprint, fingerprint
from preferences.records import Message

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=6)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | ANY_TEXT
    | st.floats(allow_nan=False, allow_infinity=False)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=8,
)


class Draw(Config):
    temperature: float = 1.0
    stop: tuple[str, ...] = ()


def same(one: Any, other: Any) -> bool:
    """Equal, and of one kind: 1, 1.0 and True are three values, as 0.0 and -0.0 are two."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, float) and isinstance(other, float):
        return one == other and math.copysign(1, one) == math.copysign(1, other)
    return type(one) is type(other) and one == other


def test_the_fingerprint_is_the_first_twenty_digits_of_the_hash_of_sorted_json() -> None:
    text = '{"a":[1,2.5,null,true],"b":"é"}'
    expected = hashlib.sha256(text.encode()).hexdigest()[:20]
    assert canonical_json({"b": "é", "a": (1, 2.5, None, True)}) == text
    assert fingerprint({"b": "é", "a": (1, 2.5, None, True)}) == expected


@given(VALUES, VALUES)
def test_different_values_have_different_fingerprints(one: Any, other: Any) -> None:
    assert (fingerprint(one) == fingerprint(other)) == same(one, other)


@given(st.dictionaries(ANY_TEXT, st.integers(), min_size=2, max_size=5))
def test_the_order_of_keys_means_nothing(value: dict[str, int]) -> None:
    assert fingerprint(dict(reversed(value.items()))) == fingerprint(value)


def test_a_configuration_and_a_record_stand_for_their_fields() -> None:
    assert fingerprint(Draw()) == fingerprint({"temperature": 1.0, "stop": []})
    assert fingerprint(Message("user", "hi")) == fingerprint({"role": "user", "content": "hi"})
    assert fingerprint(Draw(stop=("x",))) != fingerprint(Draw())


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        {1, 2},
        pytest.param(object(), id="an object"),
        print,
        b"bytes",
        {1: "a"},
        Message,
        [{"a": {1}}],
    ],
    ids=repr,
)
def test_what_has_no_canonical_form_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="canonical form"):
        fingerprint(value)


def test_a_file_stands_for_its_bytes_however_long_it_is() -> None:
    data = b"x" * (1 << 20) + b"tail"
    expected = hashlib.sha256(data).hexdigest()[:20]
    assert file_fingerprint(io.BytesIO(data)) == expected


@given(st.lists(st.text() | st.integers() | st.sampled_from(["\ud83d", '"\\\x00\u2028'])))
def test_lists_of_texts_and_numbers_are_the_json_they_always_were(value: list[str | int]) -> None:
    assert canonical_json(value) == json.dumps(value, separators=(",", ":"), ensure_ascii=False)
