"""Canonical JSON and content identity.

Two values share a fingerprint exactly when their canonical JSON is the same text. What has no
canonical form (a set, a NaN, a function, an object) is refused, never guessed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import IO, Any

from pydantic import BaseModel

FINGERPRINT_DIGITS = 20
"""80 bits: among a billion records a collision has probability below one in a million."""


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)
_ATOMS: dict[type, Callable[[Any], str]] = {str: json.encoder.encode_basestring, int: int.__repr__}


def canonical_json(value: Any) -> str:
    """`value` as JSON with sorted keys and no spaces; raises TypeError on what has no such form."""
    if type(value) in (list, tuple) and _ATOMS.keys() >= set(map(type, value)):
        # The same, several times as fast: nearly all ids are made of a few other ids.
        return f"[{','.join([_ATOMS[type(v)](v) for v in value])}]"
    return _ENCODER.encode(_plain(value))


def fingerprint(value: Any) -> str:
    """Content identity of `value`: the first 20 hex digits of the SHA-256 of its canonical JSON."""
    # "surrogatepass": a model can emit half of a surrogate pair, and its record needs an id too.
    text = canonical_json(value).encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).hexdigest()[:FINGERPRINT_DIGITS]


def file_fingerprint(stream: IO[bytes]) -> str:
    """Content identity of a file, read to its end."""
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()[:FINGERPRINT_DIGITS]


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if type(value) is list or type(value) is tuple:
        return [v if type(v) is str else _plain(v) for v in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{value} has no canonical form; use a finite number or null")
        return value
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(mode="json"))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("only mappings with text keys have a canonical form")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise TypeError(f"a {type(value).__name__} has no canonical form, so it cannot bear identity")
