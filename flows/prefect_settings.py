"""Prefect's settings, as this program wants them, for itself and for the servers it starts."""

from __future__ import annotations

import os

SETTINGS = {
    # Without these two the ephemeral server calls home and then finds its own database locked.
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_CLI_PROMPT": "false",
    # The ephemeral server has 20 s by default, which a busy laptop can miss.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
}


def apply() -> None:
    """Set them where the person has not; to be called before Prefect is imported."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
