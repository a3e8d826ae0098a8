"""What judges did not say, and whether it is missing at random."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, mannwhitneyu

from judging.missing import Missing, mann_whitney, missing_judgments, unequal_shares
from preferences.records import Candidate, Judgment, Message, Prompt

PROMPTS = {
    name: Prompt(name, (Message("user", name),), "prompts.jsonl:1", category=category)
    for name, category in (("sums", "math"), ("songs", "prose"))
}


def candidate(name: str, length: int, status: str = "complete") -> Candidate:
    return Candidate(name, "sums", "m", "x" * length, status)  # type: ignore[arg-type]


def judgment(number: int, shown: tuple[str, ...], why: str | None, of: str = "sums") -> Judgment:
    scores = None if why else (1.0,) * len(shown)
    return Judgment(f"j{number}", of, "listwise", "judge", shown, scores=scores, failure=why)


def one(judgments: list[Judgment], *candidates: Candidate) -> Missing:
    (found,) = missing_judgments(judgments, {c.candidate_id: c for c in candidates}, PROMPTS)
    return found


SHORT, LONG = candidate("short", 10), candidate("long", 500)


def test_two_of_a_hundred_pass_and_three_are_an_alarm() -> None:
    for count, alarm in ((0, False), (2, False), (3, True)):
        said = [judgment(n, ("short",), "cut off" if n < count else None) for n in range(100)]
        found = one(said, SHORT)
        assert found.share == pytest.approx(count / 100)
        assert found.is_alarming is alarm
        assert (found.sentence() is None) is not alarm


def test_the_alarm_says_how_many_and_why_most() -> None:
    failures = ["cut off"] * 3 + [f"only 0.0{n} of the probability" for n in range(5)]
    said = [judgment(n, ("short",), f) for n, f in enumerate([*failures, *[None] * 92])]
    found = one(said, SHORT)
    # The numbers in the reasons differ; they are one reason.
    assert found.reasons == {"only … of the probability": 5, "cut off": 3}
    assert found.sentence() == (
        "judge: 8 of 100 judgments are missing (8.0%, alarm above 2%), 5 of them because: "
        "only … of the probability"
    )


def test_missing_ones_that_are_of_longer_answers_are_pointed_out() -> None:
    said = [judgment(n, ("short", "short"), None) for n in range(60)]
    said += [judgment(100 + n, ("long", "short"), "cut off") for n in range(12)]
    found = one(said, SHORT, LONG)
    assert found.lengths is not None
    # 10 + 10 characters where it was read, 500 + 10 where not.
    assert (found.lengths.read, found.lengths.missing) == (20, 510)
    assert found.lengths.p_value < 1e-6
    sentence = found.sentence()
    assert sentence is not None
    assert "they are of longer answers (median 510 characters against 20)" in sentence
    turned = [
        dataclasses.replace(j, failure=None if j.failure else "cut off", scores=None) for j in said
    ]
    assert "they are of shorter answers" in (one(turned, SHORT, LONG).sentence() or "")


def test_missing_ones_of_the_same_lengths_are_not_said_to_differ() -> None:
    said = [
        judgment(n, ("long" if n % 2 else "short",), "cut off" if n % 10 < 2 else None)
        for n in range(200)
    ]
    found = one(said, SHORT, LONG)
    assert found.lengths is not None
    assert found.lengths.p_value > 0.9
    assert "answers" not in (found.sentence() or "")


def test_a_category_and_a_status_that_miss_more_are_pointed_out() -> None:
    cut = candidate("cut", 10, "truncated")
    said = [judgment(n, ("short",), None, of="songs") for n in range(90)]
    said += [judgment(100 + n, ("cut",), "no" if n < 20 else None) for n in range(30)]
    found = one(said, SHORT, cut)
    assert found.categories is not None
    assert found.statuses is not None
    # 20 of 30 in maths, all of truncated answers, and 0 of 90 elsewhere.
    assert found.categories.missing == {"math": pytest.approx(2 / 3), "prose": 0.0}
    assert found.statuses.missing == {"complete": 0.0, "truncated": pytest.approx(2 / 3)}
    sentence = found.sentence() or ""
    assert "66.7% of category math are missing" in sentence
    assert "66.7% of status truncated are missing" in sentence


def test_where_all_is_missing_or_nothing_is_there_is_nothing_to_compare() -> None:
    for failure in (None, "no"):
        found = one([judgment(n, ("short",), failure) for n in range(5)], SHORT)
        assert found.lengths is None
        assert found.categories is None
    assert found.share == 1
    assert missing_judgments([], {}, {}) == []


def test_each_judge_has_its_own_share() -> None:
    said = [judgment(n, ("short",), "no" if n == 0 else None) for n in range(4)]
    other = [dataclasses.replace(j, judge="another", failure=None) for j in said]
    found = missing_judgments([*said, *other], {"short": SHORT}, PROMPTS)
    assert [(m.judge, m.share) for m in found] == [("another", 0.0), ("judge", 0.25)]


SAMPLES = st.lists(st.integers(0, 12).map(float), min_size=3, max_size=40)


@settings(max_examples=200)
@given(SAMPLES, SAMPLES)
def test_mann_whitneys_p_value_is_scipys(first: list[float], second: list[float]) -> None:
    if len({*first, *second}) == 1:
        assert mann_whitney(first, second) == 1
        return
    expected = mannwhitneyu(first, second, method="asymptotic", use_continuity=True).pvalue
    assert mann_whitney(first, second) == pytest.approx(float(expected), abs=1e-9)
    assert mann_whitney(second, first) == pytest.approx(mann_whitney(first, second), abs=1e-9)


@pytest.mark.parametrize(
    ("missing", "of"),
    [([30, 10], [300, 300]), ([12, 14, 9], [100, 100, 100]), ([5, 40, 6], [200, 900, 100])],
)
def test_shuffling_finds_about_the_p_value_of_the_chi_squared_test(
    missing: list[int], of: list[int]
) -> None:
    table = np.array([missing, np.subtract(of, missing)])
    expected = float(chi2_contingency(table, correction=False).pvalue)
    # Of 2,000 shuffles, with three standard errors and what small counts differ from χ².
    slack = 3 * (max(expected * (1 - expected), 1e-4) / 2000) ** 0.5 + 0.02
    assert unequal_shares(missing, of) == pytest.approx(expected, abs=slack)


def test_equal_shares_are_as_equal_as_can_be() -> None:
    assert unequal_shares([5, 5], [50, 50]) == 1
