from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from judging.argilla.environment import argilla_python
from judging.argilla.server import Address, running
from preferences.errors import ServiceError
from tests.judging.argilla.argilla_api import Client


@pytest.fixture(scope="session")
def environment() -> Path:
    """The interpreter of Argilla's environment, made if this machine has none yet."""
    try:
        return argilla_python(print)
    except ServiceError as error:
        if "from versions: none" in str(error):
            pytest.skip(f"pip reaches no packages here: {error}")
        raise


@pytest.fixture(scope="session")
def argilla(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    """A server of a folder of its own, for the whole session."""
    with running(tmp_path_factory.mktemp("argilla") / "home", port=0) as address:
        yield address


@pytest.fixture(scope="session")
def owner(argilla: Address) -> Client:
    return client_of(argilla, "owner")


@pytest.fixture(scope="session")
def annotator(argilla: Address) -> Client:
    return client_of(argilla, "annotator")


def client_of(address: Address, username: str) -> Client:
    """The requests of one of the accounts of a server's first start."""
    keys = {account.username: account.api_key for account in address.created}
    return Client(address.url, keys[username])
