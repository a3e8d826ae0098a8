"""The key that the fake endpoint is asked with."""

from __future__ import annotations

import pytest

from tests.flows.asking import KEY


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
