"""Answers of mixed quality, drawn from the grammar with independent defects."""

from __future__ import annotations

import random

from world import CLOSINGS, FILLERS, GREETINGS, INSULTS, OBJECTS, STEPS, VERBS, Task


def draw_answer(rng: random.Random, task: Task, sloppiness: float = 1.0) -> str:
    """An answer to the task; `sloppiness` from 0 (perfect) to 1 scales the odds of each defect."""

    def defect(probability: float) -> bool:
        return rng.random() < probability * sloppiness

    verbs = list(STEPS[task.action])
    for _ in range(defect(0.7) + defect(0.45)):
        verbs = _blunder(rng, verbs)
    names = [task.object] * len(verbs)
    if defect(0.25):
        names = [rng.choice(OBJECTS)] * len(verbs)
    elif defect(0.25):
        names[rng.randrange(len(names))] = rng.choice(OBJECTS)

    before: list[str] = []
    after: list[str] = []
    if defect(0.35):
        rng.choice((before, after)).append(rng.choice(INSULTS))
    for filler in rng.sample(FILLERS, defect(0.5) + defect(0.3)):
        rng.choice((before, after)).append(filler)
    greeting = [] if defect(0.5) else [rng.choice(GREETINGS)]
    closing = [] if defect(0.5) else [rng.choice(CLOSINGS)]
    return " ".join(greeting + before + _steps(rng, verbs, names) + after + closing)


def spoil(rng: random.Random, answer: str) -> str:
    """The answer made malformed in one of the ways language models go wrong."""
    words = answer.split(" ")
    match rng.randrange(5):
        case 0:
            rng.shuffle(words)
        case 1:
            del words[rng.randrange(1, len(words)) :]
            words[-1] = words[-1].rstrip(".!")
        case 2:
            at = rng.randrange(len(words))
            words[at:] = [words[at]] * rng.randint(3, 20)
        case 3:
            words = [word for word in words if rng.random() < 0.7] or words[:1]
        case _:
            for _ in range(rng.randint(1, 4)):
                letters = rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 5))
                words.insert(rng.randrange(len(words) + 1), "".join(letters))
    return " ".join(words)


def _blunder(rng: random.Random, verbs: list[str]) -> list[str]:
    at = rng.randrange(len(verbs))
    match rng.randrange(4):
        case 0:
            return verbs[:at] + verbs[at + 1 :]
        case 1:
            other = rng.randrange(len(verbs))
            swapped = list(verbs)
            swapped[at], swapped[other] = swapped[other], swapped[at]
            return swapped
        case 2:
            return [*verbs[:at], rng.choice(VERBS), *verbs[at + 1 :]]
        case _:
            return [*verbs[:at], rng.choice(VERBS), *verbs[at:]]


def _steps(rng: random.Random, verbs: list[str], names: list[str]) -> list[str]:
    middle = [rng.choice(("Then", "Next")) for _ in verbs[2:]]
    connectors = ["First", *middle, "Finally"]
    return [
        f"{connector} {verb} the {name}."
        for connector, verb, name in zip(connectors, verbs, names, strict=True)
    ]
