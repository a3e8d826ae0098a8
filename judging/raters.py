"""Who judged, and what they said of pairs of answers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

from preferences.records import Judgment

SECOND, TIE, FIRST = range(3)
"""Verdicts on two answers, from the worst for the first to the best."""
OUTRIGHT: dict[str | None, float] = {"first": 1.0, "second": 0.0, "tie": 0.5}
FAMILIES = {
    name: family
    for family, names in {
        "claude": "claude",
        "command": "command cohere",
        "deepseek": "deepseek",
        "falcon": "falcon",
        "gemini": "gemini",
        "gemma": "gemma",
        "glm": "glm chatglm",
        "gpt": "gpt chatgpt davinci",
        "grok": "grok",
        "internlm": "internlm",
        "llama": "llama codellama",
        "mistral": "mistral mixtral ministral",
        "olmo": "olmo",
        "phi": "phi",
        "qwen": "qwen qwq",
        "yi": "yi",
    }.items()
    for name in names.split()
}
"""Words in a model's name, and the family they tell."""


class Opinion(NamedTuple):
    """What a judgment says of two answers."""

    rater: str
    first: str
    second: str
    leaning: float
    """P(the first is better); 1 or 0 where it was said outright, 0.5 for a tie."""
    has_order: bool
    """Whether the first was read before the second; scores of single answers have no order."""


def rater_of(judgment: Judgment) -> str:
    """The judge's name, with the annotator's where there is one: each annotator is a rater."""
    return f"{judgment.judge}/{judgment.annotator}" if judgment.annotator else judgment.judge


def is_human(judgment: Judgment) -> bool:
    """Whether a person judged."""
    return judgment.kind == "human" or judgment.kind.startswith("human_")


@lru_cache(4096)
def family_of(model: str) -> str | None:
    """The family that a model's name tells: `gpt` of `openai/gpt-4o`, `llama` of `Llama-3.1-8B`.

    None where the name tells none, or more than one, as `DeepSeek-R1-Distill-Qwen-7B`.
    """
    base = model.rstrip("/").rpartition("/")[2].lower()
    found = {FAMILIES[word] for word in re.findall("[a-z]+", base) if word in FAMILIES}
    return found.pop() if len(found) == 1 else None


def opinions(judgments: Iterable[Judgment]) -> Iterator[Opinion]:
    """What the judgments on a prompt say of pairs of its answers. Failures say nothing.

    Answers that were scored, in a list or by themselves, are compared by their scores, and equal
    scores are a tie. A list was read in its order; of an answer that the same rater scored several
    times, the mean counts.
    """
    single: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for judgment in judgments:
        if judgment.failure is not None:
            continue
        rater, ids, scores = rater_of(judgment), judgment.candidate_ids, judgment.scores
        if scores is not None:
            if len(ids) == 1:
                single[rater, judgment.kind][ids[0]].append(scores[0])
            pairs = combinations(zip(ids, scores, strict=True), 2)
            for (first, score), (second, other) in pairs:
                has_order = judgment.kind == "listwise"
                yield Opinion(rater, first, second, _outright(score, other), has_order)
        elif len(ids) == 2:
            leaning = judgment.probability
            if leaning is None:
                leaning = OUTRIGHT.get(judgment.verdict)
            if leaning is not None:
                yield Opinion(rater, *ids, leaning, True)
    for (rater, _), scored in single.items():
        means = [(candidate, sum(given) / len(given)) for candidate, given in scored.items()]
        for (first, score), (second, other) in combinations(means, 2):
            yield Opinion(rater, first, second, _outright(score, other), False)


def verdict_of(leaning: float) -> int:
    """SECOND, TIE or FIRST. A tie is 0.5 but for rounding, as the mean of 0.95 and 1 - 0.95."""
    if abs(leaning - 0.5) < 1e-9:
        return TIE
    return FIRST if leaning > 0.5 else SECOND


def _outright(one: float, other: float) -> float:
    return 0.5 if one == other else float(one > other)
