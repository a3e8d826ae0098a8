"""No test asks the Hub or calls home, and none shares Prefect's database with another process."""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows import prefect_settings

os.environ["HF_HUB_OFFLINE"] = "1"
# Kept from run to run: to make a database anew takes half a minute.
worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
home = Path(tempfile.gettempdir()) / f"pairwright-tests-{getpass.getuser()}" / worker
home.mkdir(parents=True, exist_ok=True)
os.environ["PREFECT_HOME"] = str(home)
prefect_settings.apply()


@pytest.fixture
def without_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and merging are done in the test's own process, where it sees what they do."""

    def here(what: str, work: Callable[..., Any], *arguments: Any) -> Any:
        return work(*arguments)

    monkeypatch.setattr("flows.train.in_child", here)
    monkeypatch.setattr("flows.chain.in_child", here)
