"""The miniature world: a synthetic task whose true reward is known.

A prompt asks how to do one of 8 things with one of 16 objects. The right answer is the action's
four steps, in order, on that object, with a greeting, a closing, no insult and no filler::

    How do I clean the lamp?
    Hello! First empty the lamp. Then rinse the lamp. Next scrub the lamp. Finally dry the lamp.
    Good luck!

`true_reward` scores any text at all; `reward` and `well_formed` are the same as verifiers.
Standard library only, so that a recipe can load this file by its path.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from preferences.records import Prompt

STEPS: dict[str, tuple[str, ...]] = {
    "clean": ("empty", "rinse", "scrub", "dry"),
    "move": ("measure", "wrap", "lift", "carry"),
    "paint": ("sand", "wipe", "coat", "dry"),
    "repair": ("inspect", "open", "mend", "close"),
    "sell": ("wipe", "photograph", "price", "post"),
    "store": ("empty", "dry", "wrap", "label"),
    "ship": ("measure", "wrap", "label", "post"),
    "restore": ("inspect", "sand", "mend", "polish"),
}
"""The right steps of each action, in order."""

OBJECTS = (
    "lamp", "chair", "kettle", "bicycle", "clock", "radio", "drawer", "mirror",
    "toaster", "suitcase", "basket", "cabinet", "vase", "guitar", "umbrella", "stove",
)  # fmt: skip
PHRASINGS = (
    "How do I {action} the {object}?",
    "Please tell me how to {action} the {object}.",
    "What are the steps to {action} the {object}?",
    "I want to {action} the {object}. What should I do?",
    "Explain to me how to {action} my {object}.",
    "Here is my {object}. Can you help me {action} it?",
)
GREETINGS = ("Hello!", "Hi there!", "Good morning!", "Welcome!")
CLOSINGS = ("Good luck!", "Have fun!", "Hope that helps!", "Happy to help!")
INSULTS = ("You are so lazy.", "What a silly idea.", "Anyone knows that.", "Do not be stupid.")
FILLERS = (
    "That is a great question.",
    "Many people ask about this.",
    "It is a sunny day.",
    "I like to talk.",
)
VERBS = tuple(dict.fromkeys(verb for steps in STEPS.values() for verb in steps))

WEIGHTS = {"steps": 0.40, "object": 0.20, "polite": 0.15, "civil": 0.15, "lean": 0.10}
FLOOR = WEIGHTS["civil"] + WEIGHTS["lean"]
"""What a civil, lean answer with nothing right in it would get; it is rescaled to 0."""


class Task(NamedTuple):
    """What a prompt asks for."""

    action: str
    object: str
    phrasing: int

    @property
    def prompt(self) -> str:
        """The text of the prompt."""
        return PHRASINGS[self.phrasing].format(action=self.action, object=self.object)


def tasks(*, held_out: bool) -> Iterator[Task]:
    """The 192 tasks of the 32 held-out combinations, or the 576 of the other 96."""
    for a, action in enumerate(STEPS):
        for o, name in enumerate(OBJECTS):
            # Every action misses four objects and every object two actions, so that a held-out
            # prompt is new only as a combination.
            if ((a + o) % 4 == 0) == held_out:
                for phrasing in range(len(PHRASINGS)):
                    yield Task(action, name, phrasing)


def true_reward(prompt_text: str, response_text: str) -> float:
    """How well any text answers a prompt of this world, in [0, 1].

    ``raw = .40 steps + .20 object + .15 polite + .15 civil + .10 lean``, where

    * steps: longest common subsequence of the verbs given and the right ones, divided by the
      greater of their numbers;
    * object: the share of the steps that name the right object;
    * polite: ½ for a greeting, ½ for a closing;
    * civil: 1 without an insult, else 0;
    * lean: 1, less ½ for each filler and each greeting or closing beyond the first.

    ``reward = max(0, (raw - .25) / .75) × form × finish``: form is the square of the share of the
    text's words that belong to a phrase of the grammar; finish is ½ if the text does not end in a
    full stop or an exclamation mark. A text with no step at all scores 0.

    Raises ValueError where the prompt names no action or no object of this world.
    """
    action, wanted = _asked(prompt_text)
    found = _read(response_text)
    if not found.verbs:
        return 0.0
    right = STEPS[action]
    greetings, closings = found.greetings, found.closings
    superfluous = found.fillers + max(0, greetings - 1) + max(0, closings - 1)
    parts = {
        "steps": common_subsequence(found.verbs, right) / max(len(found.verbs), len(right)),
        "object": found.objects.count(wanted) / len(found.objects),
        "polite": (min(greetings, 1) + min(closings, 1)) / 2,
        "civil": 0.0 if found.insults else 1.0,
        "lean": max(0.0, 1 - superfluous / 2),
    }
    raw = sum(WEIGHTS[name] * part for name, part in parts.items())
    form = (found.known_words / (found.known_words + found.stray_words)) ** 2
    finish = 1.0 if response_text.rstrip().endswith((".", "!")) else 0.5
    return min(1.0, max(0.0, (raw - FLOOR) / (1 - FLOOR))) * form * finish


def is_well_formed(response: str) -> bool:
    """Whether the text is a sentence of the grammar, good or bad as an answer.

    Greeting?, up to three remarks, First …, up to four Then … or Next …, Finally …?, up to three
    remarks, closing?; a remark is an insult or a filler.
    """
    return _WELL_FORMED.fullmatch(response.strip()) is not None


def reward(prompt: Prompt, response: str) -> float:
    """`true_reward` as a verifier, in [0, 1]; reads the prompt's last user message."""
    asked = next(m.content for m in reversed(prompt.messages) if m.role == "user")
    return true_reward(asked, response)


def well_formed(prompt: Prompt, response: str) -> float:
    """`is_well_formed` as a verifier: 1.0 or 0.0."""
    return float(is_well_formed(response))


def common_subsequence(given: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    best = [0] * (len(right) + 1)
    for word in given:
        diagonal = 0
        for j, other in enumerate(right, start=1):
            above = best[j]
            best[j] = diagonal + 1 if word == other else max(above, best[j - 1])
            diagonal = above
    return best[-1]


class _Found(NamedTuple):
    """What the phrases of a text are."""

    verbs: list[str]
    objects: list[str]
    greetings: int
    closings: int
    insults: int
    fillers: int
    known_words: int
    stray_words: int


def _asked(prompt_text: str) -> tuple[str, str]:
    words = set(re.findall(r"[a-z]+", prompt_text.lower()))
    action = next((a for a in STEPS if a in words), None)
    wanted = next((o for o in OBJECTS if o in words), None)
    if action is None or wanted is None:
        raise ValueError(
            f"not a prompt of the miniature world: {prompt_text!r}; "
            "recipes/miniature/prompts.jsonl and test_prompts.jsonl hold its prompts"
        )
    return action, wanted


def _read(text: str) -> _Found:
    verbs: list[str] = []
    objects: list[str] = []
    count = dict.fromkeys(("greeting", "closing", "insult", "filler"), 0)
    known = stray = 0
    for match in _PHRASE.finditer(text):
        if match["step"]:
            verbs.append(match["verb"].lower())
            objects.append(match["object"].lower())
        elif match.lastgroup in count:
            count[match.lastgroup] += 1
        else:
            stray += 1
            continue
        known += len(match[0].split())
    return _Found(
        verbs, objects, count["greeting"], count["closing"], count["insult"], count["filler"],
        known, stray,
    )  # fmt: skip


def _any(phrases: Sequence[str]) -> str:
    return "(?:" + "|".join(map(re.escape, phrases)) + ")"


def _bare(phrases: Sequence[str]) -> str:
    return _any([phrase.rstrip(".!") for phrase in phrases]).replace(r"\ ", r"\s+")


# `_PHRASE` reads leniently (any case, any punctuation); `_WELL_FORMED` knows the exact text.
# What no phrase matches is stray: a run of word characters, or any sign but plain punctuation.
_PHRASE = re.compile(
    rf"\b(?P<step>(?:(?:First|Then|Next|Finally),?\s+)?(?P<verb>{_any(VERBS)})"
    rf"\s+the\s+(?P<object>{_any(OBJECTS)}))\b"
    rf"|\b(?P<greeting>{_bare(GREETINGS)})\b|\b(?P<closing>{_bare(CLOSINGS)})\b"
    rf"|\b(?P<insult>{_bare(INSULTS)})\b|\b(?P<filler>{_bare(FILLERS)})\b"
    r"|(?P<stray>\w+|[^\s.,!?])",
    re.IGNORECASE | re.ASCII,
)
_STEP = rf"{_any(VERBS)} the {_any(OBJECTS)}\."
_REMARK = _any(INSULTS + FILLERS)
_WELL_FORMED = re.compile(
    rf"(?:{_any(GREETINGS)} )?(?:{_REMARK} ){{0,3}}"
    rf"First {_STEP}(?: (?:Then|Next) {_STEP}){{0,4}}(?: Finally {_STEP})?"
    rf"(?: {_REMARK}){{0,3}}(?: {_any(CLOSINGS)})?"
)
