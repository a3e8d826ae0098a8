"""Sending a folder to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from preferences.errors import ServiceError
from preferences.hub import push_to_hub


def test_a_model_is_pushed_as_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Hub:
        def create_repo(self, name: str, **options: Any) -> str:
            calls.append((name, options))
            return f"https://hub/{name}"

        def upload_folder(self, **options: Any) -> None:
            calls.append(("upload", options))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert push_to_hub(tmp_path, "me/mine", "model", private=True) == "https://hub/me/mine"
    assert calls == [
        ("me/mine", {"repo_type": "model", "private": True, "exist_ok": True}),
        ("upload", {"folder_path": tmp_path, "repo_id": "me/mine", "repo_type": "model"}),
    ]


def test_a_hub_that_cannot_be_reached_is_told_in_one_line(tmp_path: Path) -> None:
    # The tests run offline.
    with pytest.raises(ServiceError, match=r"me/mine: not pushed \(.*\); check the name") as caught:
        push_to_hub(tmp_path, "me/mine", "model", private=True)
    assert "\n" not in str(caught.value)
