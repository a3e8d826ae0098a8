"""The base of every configuration."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Small, frozen and closed: an unknown key is an error, never ignored.

    Every field of a `Config` changes the result, so it bears identity. Where and how something
    runs belongs in `flows.recipe.Runtime`, which never does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
