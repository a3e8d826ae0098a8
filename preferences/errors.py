"""The errors a user can cause and cure.

A bad reply, a truncated answer or an unreadable verdict is *data*: it becomes a record with a
reason. The exceptions here are for what a person has to mend. Each message is one line that names
the value, the place and the cure; the command line prints it and exits with `exit_code`.
"""

from __future__ import annotations


class PairwrightError(Exception):
    """Something a person has to mend. `exit_code` is what the command line exits with."""

    exit_code = 1


class InputError(PairwrightError):
    """A wrong call, recipe or input file: nothing has been written."""

    exit_code = 2


class MissingExtra(InputError):
    """An optional dependency is needed; the message says which extra brings it."""


class Waiting(PairwrightError):
    """Nothing failed, and it is not done either: people's answers are awaited."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


class ServiceError(PairwrightError):
    """An engine, endpoint or disk failed after its retries; a rerun continues where it stopped."""
