"""Rubrics: the words a judge is asked in, kept as text files.

A rubric is written in one of two ways. Criteria alone, as those that ship: the first line ends the
sentence "Decide which one …", and what to look at follows after a blank line; the frame around
them comes from here, one for each kind of judge. Or the whole question, with the placeholders of
its kind of judge. Placeholders are filled in one pass, so braces in a model's answer are harmless;
the question's own tags are disarmed in what fills them, so an answer cannot end its place and
speak as the judge.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal

from judging.judge import Comparison
from preferences.errors import InputError
from preferences.fingerprint import fingerprint
from preferences.records import Candidate, Messages, Prompt
from preferences.tables import suggestion

Shape = Literal["pairwise", "pairwise_reasoned", "pointwise", "listwise"]
"""The kind of judge that a question is for."""
LABELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""What the answers of a list are called, in the order shown."""

_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
# Models read `</A >`, `</a>` and `<A/>` as tags too.
_TAG = re.compile(r"<[\s/\\]*(\w+)(?:[\s/][^<>]*)?>")
_NEEDED: dict[Shape, tuple[str, ...]] = {
    "pairwise": ("prompt", "first", "second"),
    "pairwise_reasoned": ("prompt", "first", "second"),
    "pointwise": ("prompt", "answer"),
    "listwise": ("prompt", "answers"),
}


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
        shown = {"first": comparison.first.response, "second": comparison.second.response}
        return _fill(self.text, comparison.prompt, shown)

    def render_one(self, prompt: Prompt, candidate: Candidate) -> str:
        """The question about this one answer."""
        return _fill(self.text, prompt, {"answer": candidate.response})

    def render_list(self, prompt: Prompt, candidates: Sequence[Candidate]) -> str:
        """The question about these answers, called A, B, C and so on; at most 26."""
        shown = dict(zip(LABELS, (c.response for c in candidates), strict=False))
        answers = "\n\n".join(f"<answer_{n}>\n{{{{{n}}}}}\n</answer_{n}>" for n in shown)
        return _fill(self.text.replace("{{answers}}", answers), prompt, shown)


def load_rubric(name: str, shape: Shape = "pairwise") -> Rubric:
    """A rubric that ships with Pairwright, by name, or one of your own, by path.

    Raises InputError for one that is not there, or that is for another kind of judge.
    """
    text = rubric_text(name)
    if _PLACEHOLDER.search(text):
        _check_places(name, text, shape)
    else:
        text = _framed(name, text, _shipped()[f"_{shape}"].read_text(encoding="utf-8"))
    return Rubric(Path(name).stem, text.strip())


def rubric_text(name: str) -> str:
    """A rubric as it was written; raises InputError for one that is not there."""
    files = _shipped()
    # Those with an underscore are the frames.
    shipped = sorted(stem for stem in files if not stem.startswith("_"))
    if name in shipped:
        return files[name].read_text(encoding="utf-8")
    if Path(name).is_file():
        return Path(name).read_text(encoding="utf-8")
    raise InputError(f"no rubric {name!r}; {suggestion(name, shipped)}")


def _shipped() -> dict[str, Traversable]:
    found = resources.files("judging.rubrics").iterdir()
    return {Path(f.name).stem: f for f in found if f.name.endswith(".md")}


def conversation_text(messages: Messages) -> str:
    """A conversation as a judge reads it: one user turn as it is, more turns with their roles."""
    if len(messages) == 1:
        return messages[0].content
    return "\n\n".join(f"{m.role.capitalize()}: {m.content}" for m in messages)


def _check_places(name: str, text: str, shape: Shape) -> None:
    found, needed = set(_PLACEHOLDER.findall(text)), set(_NEEDED[shape])
    if found == needed:
        return
    wanted = ", ".join(f"{{{{{place}}}}}" for place in _NEEDED[shape])
    for other, places in _NEEDED.items():
        if found == set(places):
            raise InputError(
                f"rubric {name!r} is for a {other} judge; a {shape} one needs {wanted}, or "
                "criteria alone"
            )
    wrong = sorted(needed - found) or sorted(found - needed)
    problem = "lacks" if needed - found else "has the unknown"
    raise InputError(
        f"rubric {name!r} {problem} {{{{{wrong[0]}}}}}; a {shape} judge needs {wanted}, or "
        "criteria alone"
    )


def _framed(name: str, text: str, frame: str) -> str:
    aim, _, criteria = text.strip().partition("\n\n")
    if not criteria.strip() or "\n" in aim:
        raise InputError(
            f"rubric {name!r} has neither placeholders, as {{{{prompt}}}}, nor criteria: one line "
            'that ends "Decide which one", a blank line, and what to look at; mend the text'
        )
    parts = {"aim": aim.strip().rstrip("."), "criteria": criteria.strip()}
    return _PLACEHOLDER.sub(lambda match: parts.get(match[1], match[0]), frame)


def _fill(text: str, prompt: Prompt, shown: Mapping[str, str]) -> str:
    values = {"prompt": conversation_text(prompt.messages), **shown}
    # Answers that are not there have tags too: one must not invent another.
    tags = {name.lower() for name in (*_TAG.findall(text), *(f"answer_{n}" for n in LABELS))}
    return _PLACEHOLDER.sub(lambda match: _disarm(values[match[1]], tags), text)


def _disarm(text: str, tags: set[str]) -> str:
    return _TAG.sub(lambda m: f"‹{m[0][1:-1]}›" if m[1].lower() in tags else m[0], text)
