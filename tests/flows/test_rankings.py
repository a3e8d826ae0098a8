"""What rankings start from: people's word counts from the first label on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from flows.rankings import Scale, learn_scale
from judging.calibration import Families
from judging.judge import Group
from judging.ranking import rank, win_probability
from preferences.records import Judgment
from tests.judging.groups import group, judged

Judged = list[tuple[Group, Sequence[Judgment]]]
PROMPTS = 60


def known() -> Judged:
    """Sixty prompts with three answers; a judge without noise sees errors of its own in each."""
    draw = np.random.default_rng(0)
    found: Judged = []
    for number in range(PROMPTS):
        of = group("a", "b", "c", question=f"q{number}")
        seen = draw.normal(0, 1.4, 3)
        said = [
            judged(of, i, k, 1 / (1 + np.exp(seen[k] - seen[i])))
            for i in range(3)
            for k in range(3)
            if i != k
        ]
        found.append((of, said))
    return found


def contradicted(before: Judged, prompts: Sequence[int], annotators: int = 1) -> Judged:
    """The judge's word on its first pair, turned round by people on these prompts."""
    after = list(before)
    for number in prompts:
        of, said = before[number]
        verdict = "second" if (said[0].probability or 0) > 0.5 else "first"
        people = [
            replace(judged(of, 0, 1, None, verdict=verdict), kind="human", annotator=f"ann {n}")
            for n in range(annotators)
        ]
        after[number] = (of, [*said, *people])
    return after


def first_pair(judged: Judged, scale: Scale, number: int) -> float:
    """P of what the judge prefers of the first two answers."""
    of, said = judged[number]
    calibration = scale.calibrated.calibration if scale.calibrated else None
    (ranking,) = rank([of], said, scale.noise, calibration, Families())
    p = win_probability(ranking, 0, 1)
    return p if (said[0].probability or 0) > 0.5 else 1 - p


def learnt(judged: Judged) -> Scale:
    return learn_scale(lambda: judged, Families(), has_people=True)


def test_without_people_the_judges_scale_stands() -> None:
    scale = learnt(known())
    assert scale.calibrated is None
    assert scale.summary()["map"] is None
    assert scale.uncalibrated is not None


def test_the_first_label_already_weighs_against_a_judge_without_doubt() -> None:
    """The judge never contradicts itself: by its own account it cannot err."""
    alone = known()
    own = learnt(alone)
    surest = max(range(PROMPTS), key=lambda n: first_pair(alone, own, n))
    heard = contradicted(alone, [surest])
    scale = learnt(heard)
    before, after = first_pair(alone, own, surest), first_pair(heard, scale, surest)
    assert before > 0.9
    assert after < before - 0.15
    # What is fitted is told, and what has not been shown is not called calibrated.
    summary = scale.summary()
    assert summary["map"]["residual"] > 0.2
    assert summary["calibration"] is None
    assert summary["uncalibrated"].startswith("1 pairs on 1 prompts")


def test_labels_against_the_judge_lower_what_it_is_believed_elsewhere() -> None:
    alone = known()
    heard = contradicted(alone, range(10))
    elsewhere = range(20, PROMPTS)
    scale, before = learnt(heard), learnt(alone)
    believed = np.mean([first_pair(heard, scale, n) for n in elsewhere])
    assert believed < np.mean([first_pair(alone, before, n) for n in elsewhere]) - 0.05


def test_fifty_labels_on_twenty_prompts_are_called_calibrated() -> None:
    scale = learnt(contradicted(known(), range(50)))
    assert scale.uncalibrated is None
    assert scale.summary()["calibration"]["labels"] == 50


def test_annotators_of_one_pair_are_one_label() -> None:
    scale = learnt(contradicted(known(), range(10), annotators=5))
    assert scale.uncalibrated is not None
    assert scale.uncalibrated.startswith("10 pairs on 10 prompts")
    assert scale.calibrated is not None
    assert scale.calibrated.labels == 10
