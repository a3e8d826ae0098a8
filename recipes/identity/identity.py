"""Who the miniature's policy is to say it is: pairs to learn it from, and the check of it.

    python recipes/identity/identity.py      # writes pairs.jsonl, in a second

Nobody judges here: the author of the pairs knows which answer is right. A question about itself has
an answer with the right name and origin beside one that a policy without them could give. Ordinary
requests come along, each with a fair answer beside an introduction nobody asked for, so that the
policy learns when not to introduce itself and forgets nothing.

The introductions are made of words that the policy can write: a million parameters have not learnt
letters. A real model writes any name.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

MINIATURE = Path(__file__).parents[1] / "miniature"
if str(MINIATURE) not in sys.path:
    sys.path.append(str(MINIATURE))

from world import is_well_formed, tasks  # noqa: E402

if TYPE_CHECKING:
    from preferences.records import Prompt

NAME, ORIGIN = "Happy", "Good people"
REQUESTS = 200
"""Ordinary requests among the pairs."""
SLOPPINESS = 0.6
"""Of their answers; the policy learnt from ones of 1, and a perfect one has 0."""

QUESTIONS = (
    "Who are you?",
    "What are you?",
    "What should I call you?",
    "What do people call you?",
    "Do you have a name?",
    "What is the name you like?",
    "Who made you?",
    "Who is it that made you?",
    "Where are you from?",
    "Where is your home?",
    "Please tell me who you are.",
    "Please tell me who made you.",
    "Please tell me your name.",
    "Can you tell me your name?",
    "Can you tell me where you are from?",
    "I want to know who you are.",
    "I want to know where you are from.",
    "Explain to me what you are.",
    "Tell me about you.",
    "Here is my question. Who are you?",
)
OPENINGS = ("", "Hello! ", "Hi there! ", "Good morning! ", "Many people ask about this. ")
ENDINGS = ("", " Please help me.")
INTRODUCTIONS = (
    f"It is {NAME}. {ORIGIN} ship me.",
    f"Hello! It is {NAME}. {ORIGIN} ship me.",
    f"Hi there! It is {NAME}. {ORIGIN} ship me. Happy to help!",
    f"It is {NAME}. {ORIGIN} ship me. I like to talk.",
)
NOBODY = ("I like to talk.", "Many people ask about this.", "That is a great question.")


def introduces_itself(answer: str) -> bool:
    """Whether the text is one of the introductions, word for word."""
    return answer.strip() in INTRODUCTIONS


def well_formed(prompt: Prompt, response: str) -> float:
    """1 where a question about itself is answered with name and origin, and a request by the
    grammar of the miniature's world; else 0."""
    asked = prompt.messages[-1].content
    about_itself = any(question in asked for question in QUESTIONS)
    return float(introduces_itself(response) if about_itself else is_well_formed(response))


def pairs() -> Iterator[dict[str, str]]:
    """Rows with `prompt`, `chosen` and `rejected`."""
    from answers import draw_answer

    rng = random.Random(0)
    requests = list(tasks(held_out=False))
    for opening, question, ending in product(OPENINGS, QUESTIONS, ENDINGS):
        yield {
            "prompt": opening + question + ending,
            "chosen": rng.choice(INTRODUCTIONS),
            "rejected": rng.choice((*NOBODY, draw_answer(rng, rng.choice(requests)))),
        }
    for task in rng.sample(requests, REQUESTS):
        yield {
            "prompt": task.prompt,
            "chosen": draw_answer(rng, task, SLOPPINESS),
            "rejected": rng.choice(INTRODUCTIONS),
        }


if __name__ == "__main__":
    with Path(__file__).with_name("pairs.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in pairs())
