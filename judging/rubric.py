"""Rubrics: the words a judge is asked in, kept as text files.

A rubric is a text with the placeholders `{{prompt}}`, `{{first}}` and `{{second}}`. They are filled
in one pass, so braces in a model's answer are harmless; the rubric's own tags are disarmed in what
fills them, so an answer cannot end its place and speak as the judge.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from judging.judge import Comparison
from preferences.errors import InputError
from preferences.fingerprint import fingerprint
from preferences.records import Messages
from preferences.tables import suggestion

_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
_TAG = re.compile(r"<\s*/?\s*(\w+)\s*>")
_NEEDED = {"prompt", "first", "second"}


@dataclass(frozen=True)
class Rubric:
    """A judge's question."""

    name: str
    text: str

    @property
    def identity(self) -> str:
        """Changes with the text, so that an edited rubric is asked anew."""
        return fingerprint(self.text)

    def render(self, comparison: Comparison) -> str:
        """The question about these two answers, in the order of the comparison."""
        values = {
            "prompt": conversation_text(comparison.prompt.messages),
            "first": comparison.first.response,
            "second": comparison.second.response,
        }
        tags = {name.lower() for name in _TAG.findall(self.text)}
        return _PLACEHOLDER.sub(lambda match: _disarm(values[match[1]], tags), self.text)


def load_rubric(name: str) -> Rubric:
    """A rubric that ships with Pairwright, by name, or one of your own, by path."""
    shipped = {
        Path(f.name).stem: f
        for f in resources.files("judging.rubrics").iterdir()
        if f.name.endswith(".md")
    }
    if name in shipped:
        text = shipped[name].read_text(encoding="utf-8")
    elif Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8")
    else:
        raise InputError(f"no rubric {name!r}; {suggestion(name, sorted(shipped))}")
    found = set(_PLACEHOLDER.findall(text))
    if found != _NEEDED:
        wrong = sorted(_NEEDED - found) or sorted(found - _NEEDED)
        problem = "lacks" if _NEEDED - found else "has the unknown"
        raise InputError(f"rubric {name!r} {problem} {{{{{wrong[0]}}}}}; mend the text")
    return Rubric(Path(name).stem, text.strip())


def conversation_text(messages: Messages) -> str:
    """A conversation as a judge reads it: one user turn as it is, more turns with their roles."""
    if len(messages) == 1:
        return messages[0].content
    return "\n\n".join(f"{m.role.capitalize()}: {m.content}" for m in messages)


def _disarm(text: str, tags: set[str]) -> str:
    # Models read `</A >` and `</a>` as they read `</A>`.
    return _TAG.sub(lambda m: f"‹{m[0][1:-1]}›" if m[1].lower() in tags else m[0], text)
