"""What the figures say of people who label, on answers whose figures are known by hand."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest

from judging.argilla.annotators import BREAK_SECONDS, crowd, tables, warnings
from judging.argilla.labels import Answer
from judging.gold import Gold
from judging.people import Question
from preferences.records import Verdict
from tests.judging.argilla.labellers import about_qualities, planted, verdict_of

START = datetime(2026, 1, 31, 9, tzinfo=UTC)


def answer(
    question: Question, annotator: str, said: Verdict | tuple[float, ...], seconds: float = 0
) -> Answer:
    at = START + timedelta(seconds=seconds)
    return Answer(question.about, said, annotator, "", at, False)


def preferring(question: Question, quality: int) -> Verdict:
    """The verdict that prefers the answer of this quality."""
    first, second = planted(question.about.shown)
    return verdict_of(first == quality, second == quality)


def gold(number: int) -> Gold:
    """Its better answer has quality 2."""
    question = about_qualities(number, [1, 2], "gold")
    (better,) = (i for i in question.about.shown if planted([i]) == (2,))
    return Gold(question, better)


def pairs(said: Sequence[Sequence[int]], *annotators: str) -> list[Answer]:
    """For each pair, the quality that each annotator prefers; 0 is a tie."""
    return [
        answer(question, annotator, preferring(question, quality))
        for n, row in enumerate(said)
        for question in [about_qualities(n, [1, 2], "calibrate")]
        for annotator, quality in zip(annotators, row, strict=False)
    ]


def test_nobody_has_answered_yet() -> None:
    nobody = crowd([])
    assert nobody.annotators == ()
    assert (nobody.agreement.value, nobody.alpha.value) == (None, None)
    assert list(warnings(nobody)) == []
    assert tables(nobody) == []


def test_time_between_answers_is_the_median_without_breaks() -> None:
    times = (0, 10, 30, 90, 90 + BREAK_SECONDS + 1, 100 + BREAK_SECONDS + 1)
    given = [answer(about_qualities(n, [1, 2]), "ada", "tie", t) for n, t in enumerate(times)]
    (ada,) = crowd(reversed(given)).annotators
    # Gaps of 10, 20, 60, a break, and 10: of 10, 10, 20 and 60 the median is 15.
    assert ada.seconds == 15
    assert ada.last == START + timedelta(seconds=times[-1])
    (once,) = crowd(given[:1]).annotators
    assert once.seconds is None


def test_gold_is_right_where_the_better_answer_is_preferred_and_a_tie_is_wrong() -> None:
    known = [gold(n) for n in range(5)]
    said = [2, 2, 2, 1, 0]
    given = [
        answer(g.question, "ada", preferring(g.question, quality))
        for g, quality in zip(known, said, strict=True)
    ]
    (ada,) = crowd(given, known).annotators
    assert (ada.answers, ada.gold_answers, ada.gold_right) == (5, 5, 3)
    (warning,) = warnings(crowd(given, known))
    assert "ada is right on 3 of 5 gold questions (60%, below 80%)" in warning
    # Too few to tell, and what is gold no more tells nothing.
    assert list(warnings(crowd(given[1:], known))) == []
    (ada,) = crowd(given, known[:2]).annotators
    assert (ada.gold_answers, ada.gold_right) == (2, 2)
    # Four of five are 80%, which is enough.
    given[4] = answer(known[4].question, "ada", preferring(known[4].question, 2))
    assert list(warnings(crowd(given, known))) == []


def test_agreement_counts_the_verdicts_of_each_two_people() -> None:
    # On the first pair all three agree: 3 of 3. On the second ada is alone: 1 of 3. On the third
    # only two said something, and one of them a tie: 0 of 1.
    given = pairs([(2, 2, 2), (1, 2, 2), (2, 0)], "ada", "bob", "cy")
    measured = gold(7)
    given += [answer(measured.question, "ada", "tie"), answer(measured.question, "cy", "first")]
    found = crowd(given, [measured])
    assert found.pairs == 3
    assert found.agreement.value == pytest.approx(4 / 7)
    by_name = {one.name: (one.agreed, one.shared) for one in found.annotators}
    assert by_name == {"ada": (2, 5), "bob": (3, 5), "cy": (3, 4)}


def test_a_pair_that_was_shown_in_both_orders_is_one_pair() -> None:
    numbers = range(20)
    shown = [
        (about_qualities(n, [1, 2], "calibrate"), about_qualities(n, [1, 2], "ask"))
        for n in numbers
    ]
    turned = [(a, b) for a, b in shown if a.about.shown == b.about.shown[::-1]]
    one, other = turned[0]
    given = [
        answer(one, "ada", preferring(one, 2)),
        answer(other, "bob", preferring(other, 2)),
    ]
    found = crowd(given)
    assert (found.pairs, found.agreement.value) == (1, 1.0)


def test_alpha_is_krippendorffs() -> None:
    """Krippendorff 2011, section A: two observers, ten articles, 14 zeros and 6 ones."""
    # They differ on 4 articles, so alpha = 1 - (20 - 1) · 4 / (14 · 6) = 0.095.
    meg, owen = "0100000000", "1110010100"
    # Zero prefers the answer of the lower id, whichever was shown first.
    given = []
    for n, values in enumerate(zip(meg, owen, strict=True)):
        question = about_qualities(n, [1, 2], "calibrate")
        for name, value in zip(("meg", "owen"), values, strict=True):
            lower = question.about.shown.index(min(question.about.shown))
            first = (lower == 0) == (value == "0")
            given.append(answer(question, name, "first" if first else "second"))
    found = crowd(given)
    assert found.alpha.value == pytest.approx(0.095, abs=5e-4)
    assert found.agreement.value == 0.6
    (warning,) = warnings(found)
    assert "10 pairs" in warning
    assert "0.10, below 0.4" in warning
    assert list(warnings(crowd(given[:-2]))) == []  # too few pairs to tell


def test_a_ranking_is_a_verdict_on_each_two_of_its_answers() -> None:
    question = about_qualities(1, [1, 2, 3], "calibrate")
    given = [
        answer(question, "ada", (-1.0, -2.0, -3.0)),
        answer(question, "bob", (-1.0, -3.0, -2.0)),
    ]
    found = crowd(given)
    # They agree on the first against the second and the third, not on these two.
    assert (found.pairs, found.agreement.value) == (3, pytest.approx(2 / 3))


def test_the_table_has_a_row_for_each_annotator() -> None:
    annotators, together = tables(crowd(pairs([(2, 2), (1, 2), (2,)], "ada", "bob")))
    assert [row[:2] for row in annotators.rows] == [("ada", "3"), ("bob", "2")]
    assert together.rows[0][:2] == ("2", "50.0%")
    assert all(len(row) == len(annotators.header) for row in annotators.rows)
