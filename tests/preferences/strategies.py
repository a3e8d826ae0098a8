"""Records of every kind, for property tests."""

from __future__ import annotations

import dataclasses
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hypothesis import strategies as st

from preferences.records import Message

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)
"""With lone surrogates, as a model can emit them."""
ENCODABLE = st.text(max_size=20)
PROMPT_IDS = st.text("0123456789abcdef", min_size=20, max_size=20)


def records(record: type[Any]) -> st.SearchStrategy[Any]:
    """Any record of a type, with every optional field given or left out."""
    hints = get_type_hints(record)
    return st.builds(record, **{f.name: _value(hints[f.name]) for f in dataclasses.fields(record)})


def mended(value: Any) -> Any:
    """What is left of a value whose lone surrogates have no UTF-8: a `?` for each."""
    if isinstance(value, str):
        return "".join("?" if 0xD800 <= ord(c) <= 0xDFFF else c for c in value)
    if isinstance(value, tuple):
        return tuple(mended(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return type(value)(**{f.name: mended(getattr(value, f.name)) for f in fields})
    return value


def _value(hint: Any) -> st.SearchStrategy[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        (inner,) = (a for a in get_args(hint) if a is not type(None))
        return st.none() | _value(inner)
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is tuple:
        (inner, _) = get_args(hint)
        # Tuples of texts hold ids, and ids are hex digits.
        items = PROMPT_IDS if inner is str else _value(inner)
        return st.lists(items, max_size=4).map(tuple)
    if hint is Message:
        roles = st.sampled_from(["system", "user", "assistant", "tool"])
        return st.builds(Message, roles, ANY_TEXT)
    kinds = {
        str: ANY_TEXT,
        int: st.integers(-(2**63), 2**63 - 1),
        float: st.floats(allow_nan=False),
        bool: st.booleans(),
    }
    return kinds[hint]
