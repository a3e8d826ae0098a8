"""Answers that can be checked: by a known answer, a pattern, or a function of yours."""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import model_validator

from judging.judge import Group, Judge
from preferences.config import Config
from preferences.errors import InputError
from preferences.fingerprint import fingerprint
from preferences.records import Judgment, Prompt

Check = Callable[[Prompt, str], float]
"""A prompt and an answer in, a score out: higher is better, True and False will do."""


class Verifier(Config):
    """A check that needs no model."""

    kind: Literal["verifier"]
    name: str
    """What the records call this judge."""
    check: str
    """`exact`: equal to the prompt's reference, spaces and case aside; `regex`: the pattern is
    found in the answer; or `package.module:function` or `file.py:function`, which is called with
    the prompt and the answer and returns a score, higher is better."""
    pattern: str | None = None
    """The pattern, for `regex`."""

    @model_validator(mode="after")
    def _pattern_with_regex(self) -> Verifier:
        if (self.check == "regex") != (self.pattern is not None):
            raise ValueError("`pattern` goes with `check: regex`, and only with it")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"`pattern` is not a regular expression ({error})") from error
        return self


def load_check(check: str, pattern: str | None = None) -> Check:
    """The function a configuration names; raises InputError if it is not there."""
    if check == "exact":
        return _equals_reference
    if check == "regex":
        compiled = re.compile(pattern or "")
        return lambda prompt, response: float(compiled.search(response) is not None)
    return _load_function(check)


def verifier(config: Verifier, identity: str) -> Judge:
    """A judge that scores each answer by itself. A check that raises is a failure record."""
    check = load_check(config.check, config.pattern)

    def judge(groups: Iterable[Group]) -> Iterator[Judgment]:
        for group in groups:
            for candidate in group.candidates:
                scores, failure = None, None
                try:
                    scores = (_number(check(group.prompt, candidate.response)),)
                except Exception as error:  # the user's function may raise anything
                    failure = f"{type(error).__name__}: {error}"
                yield Judgment(
                    judgment_id=fingerprint([identity, candidate.candidate_id]),
                    prompt_id=group.prompt.prompt_id,
                    kind="verifier",
                    judge=config.name,
                    candidate_ids=(candidate.candidate_id,),
                    scores=scores,
                    failure=failure,
                )

    return judge


def _number(score: float) -> float:
    if not math.isfinite(score):
        raise ValueError(f"the score is {score}, which is no number")
    return float(score)


def _equals_reference(prompt: Prompt, response: str) -> float:
    if prompt.reference is None:
        raise ValueError("the prompt has no reference answer")
    return float(_normal(prompt.reference) == _normal(response))


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


def _load_function(check: str) -> Check:
    place, _, name = check.rpartition(":")
    if not place:
        raise InputError(
            f"no check {check!r}; use exact, regex, package.module:function or file.py:function"
        )
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise InputError(f"{place}: no such file; check the path of the verifier")
        spec = importlib.util.spec_from_file_location(f"pairwright_check_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(place)
        except ImportError as error:
            raise InputError(f"{check}: module {place!r} cannot be imported ({error})") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"{check}: no function {name!r} in {place}")
    return function  # type: ignore[no-any-return]
