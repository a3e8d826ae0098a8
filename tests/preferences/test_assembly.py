"""Rankings into pairs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from judging.judge import Group
from judging.ranking import rank, win_probability
from preferences.assembly import PairsConfig, assemble, triplets
from preferences.records import (
    Candidate,
    Dropped,
    Message,
    Preference,
    Prompt,
    Ranking,
    Triplet,
    from_table,
    to_table,
)

PROMPT = Prompt("ab" * 10, (), "p.jsonl:1")
ANSWERS = ("a first answer", "quite another one", "something else again", "no more of this, please")


def answer(n: int, text: str, status: str = "complete") -> Candidate:
    return Candidate(f"c{n}", PROMPT.prompt_id, f"m{n}", text, status)  # type: ignore[arg-type]


def ranking(*means: float, judged: bool = True) -> Ranking:
    """Sure of every mean: the probability of a pair is σ of the difference."""
    size = len(means)
    covariance = tuple(np.zeros(size * size).tolist())
    ids = tuple(f"c{n}" for n in range(size))
    return Ranking(PROMPT.prompt_id, ids, means, covariance, ("j",) if judged else ())


def assembled(
    of: Ranking,
    texts: tuple[str, ...] = ANSWERS,
    statuses: dict[int, str] | None = None,
    **values: object,
) -> list[Preference | Dropped]:
    found = [answer(n, text, (statuses or {}).get(n, "complete")) for n, text in enumerate(texts)]
    config = PairsConfig(**values)  # type: ignore[arg-type]
    return list(assemble([of], {c.candidate_id: c for c in found}, config, win_probability))


def pairs(records: list[Preference | Dropped]) -> list[tuple[str, str]]:
    return [(r.chosen_id, r.rejected_id) for r in records if isinstance(r, Preference)]


def reasons(records: list[Preference | Dropped]) -> list[tuple[str, str]]:
    return [(r.reason, r.detail) for r in records if isinstance(r, Dropped)]


def test_best_worst_pairs_the_ends_with_their_probability_and_margin() -> None:
    (found,) = assembled(ranking(0.5, 3.0, -1.0, 1.0))
    assert isinstance(found, Preference)
    assert (found.chosen_id, found.rejected_id) == ("c1", "c2")
    assert found.margin == pytest.approx(4.0)
    # σ(4) = 1 / (1 + e⁻⁴) = 0.9820
    assert found.probability == pytest.approx(0.9820, abs=1e-4)


def test_all_pairs_are_every_pair_the_better_first() -> None:
    found = assembled(ranking(0.5, 3.0, -1.0, 8.0), policy="all_pairs")
    assert pairs(found) == [
        ("c3", "c1"), ("c3", "c0"), ("c3", "c2"), ("c1", "c0"), ("c1", "c2"), ("c0", "c2"),
    ]  # fmt: skip


def test_best_random_draws_by_the_prompts_id_alone() -> None:
    one = assembled(ranking(0.0, 5.0, -1.0, -2.0), policy="best_random")
    assert one == assembled(ranking(0.0, 5.0, -1.0, -2.0), policy="best_random")
    drawn: Counter[str] = Counter()
    for n in range(300):
        of = dataclasses.replace(ranking(0.0, 5.0, -1.0, -2.0), prompt_id=f"{n:020x}")
        ((chosen, rejected),) = pairs(assembled(of, policy="best_random"))
        assert chosen == "c1"
        drawn[rejected] += 1
    # 100 each; four binomial standard deviations are 4 * sqrt(300 * 1/3 * 2/3) = 33.
    assert set(drawn) == {"c0", "c2", "c3"}
    assert all(67 <= count <= 133 for count in drawn.values())


def test_an_unsure_pair_is_dropped_with_its_probability() -> None:
    # σ(0.4) = 0.5987, just below 0.6.
    found = assembled(ranking(0.4, 0.0))
    assert (pairs(found), reasons(found)) == ([], [("probability_below_minimum", "0.599")])


def test_a_tie_is_no_preference_however_little_is_asked_for() -> None:
    found = assembled(ranking(1.0, 1.0, 1.0), policy="all_pairs", min_probability=0.5)
    assert [reason for reason, _ in reasons(found)] == ["probability_below_minimum"] * 3


@pytest.mark.parametrize(
    "twin", ["a first answer", "a  first\nanswer ", "A first answer", "a first answer."]
)
def test_answers_that_are_alike_are_never_paired(twin: str) -> None:
    found = assembled(ranking(4.0, 0.0), ("a first answer", twin), max_similarity=0.9)
    assert [reason for reason, _ in reasons(found)] == ["answers_too_alike"]


def test_only_equal_answers_are_alike_where_that_is_asked_for() -> None:
    found = assembled(ranking(4.0, 0.0), ("a first answer", "a first answer."), max_similarity=1)
    assert pairs(found) == [("c0", "c1")]
    equal = assembled(ranking(4.0, 0.0), ("same", "same"), max_similarity=1)
    assert reasons(equal) == [("answers_too_alike", "1.000")]


def test_two_texts_are_paired_once_however_often_a_model_said_them() -> None:
    # The first and the third answer are one text: against the second it won, and it lost.
    texts = ("yes of course", "no, never", "yes of course")
    found = assembled(ranking(4.0, 2.0, 0.0), texts, policy="all_pairs")
    assert pairs(found) == [("c0", "c1")]
    (kept,) = (r.preference_id for r in found if isinstance(r, Preference))
    alike, again = reasons(found)
    assert alike == ("answers_too_alike", "1.000")
    assert again == ("same_texts_again", kept)


def test_a_truncated_answer_is_never_chosen_but_may_be_rejected() -> None:
    assert reasons(assembled(ranking(4.0, 0.0), statuses={0: "truncated"})) == [
        ("chosen_truncated", "c0")
    ]
    assert pairs(assembled(ranking(4.0, 0.0), statuses={1: "truncated"})) == [("c0", "c1")]


def test_what_nobody_judged_is_dropped_and_so_is_a_single_answer() -> None:
    assert reasons(assembled(ranking(0.0, 0.0, judged=False))) == [("not_judged", "")]
    assert reasons(assembled(ranking(0.0))) == [("fewer_than_two_candidates", "1 candidates")]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8, unique=True), st.randoms())
def test_a_triplet_has_the_texts_its_ids_name(numbers: list[int], draw: Random) -> None:
    prompts = [
        Prompt(f"p{n}", (Message("system", "Be kind."), Message("user", f"question {n}")), "p:1")
        for n in range(10)
    ]
    answers = [
        Candidate(f"{side}{n}", f"p{n}", f"{side} model", f"{side} answer {n}", "complete")
        for n in range(10)
        for side in ("good", "bad")
    ]
    preferences = [
        Preference(f"x{n}", f"p{n}", f"good{n}", f"bad{n}", 0.9, 2.2, ("j",)) for n in numbers
    ]
    draw.shuffle(prompts)
    draw.shuffle(answers)
    tables = to_table(Preference, preferences), to_table(Prompt, prompts)
    found = from_table(Triplet, triplets(*tables, to_table(Candidate, answers)))
    assert found == [
        Triplet(
            preference_id=f"x{n}",
            prompt_id=f"p{n}",
            prompt=(Message("system", "Be kind."), Message("user", f"question {n}")),
            chosen=(Message("assistant", f"good answer {n}"),),
            rejected=(Message("assistant", f"bad answer {n}"),),
            chosen_id=f"good{n}",
            rejected_id=f"bad{n}",
            chosen_model="good model",
            rejected_model="bad model",
            probability=0.9,
            margin=2.2,
        )
        for n in numbers
    ]


def test_a_preference_whose_answer_is_nowhere_is_refused() -> None:
    preference = Preference("x", PROMPT.prompt_id, "c0", "c9", 0.9, 2.2, ("j",))
    answers = to_table(Candidate, [answer(0, "yes")])
    with pytest.raises(KeyError, match="no candidate_id c9"):
        triplets(to_table(Preference, [preference]), to_table(Prompt, [PROMPT]), answers)


TEXTS = st.sampled_from(["yes", "no", "yes ", "perhaps it is so", "", "perhaps it was so"])


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-3, 3), TEXTS), min_size=2, max_size=5),
    st.sampled_from(["best_worst", "best_random", "all_pairs"]),
    st.floats(0.5, 1),
)
def test_chosen_is_always_the_better_and_another_text(
    answers: list[tuple[float, str]], policy: str, least: float
) -> None:
    means, texts = zip(*answers, strict=True)
    found = assembled(ranking(*means), texts, policy=policy, min_probability=least)
    for record in found:
        if isinstance(record, Preference):
            chosen, rejected = int(record.chosen_id[1:]), int(record.rejected_id[1:])
            assert means[chosen] > means[rejected]
            assert texts[chosen].split() != texts[rejected].split()
            assert record.probability >= least
    # Nothing is lost: every pair that a policy proposes is there, kept or dropped.
    size = len(answers)
    assert len(found) == (size * (size - 1) // 2 if policy == "all_pairs" else 1)


def test_a_ranking_without_readable_judgments_makes_no_pair() -> None:
    candidates = tuple(answer(n, text) for n, text in enumerate(ANSWERS[:2]))
    (of,) = rank([Group(PROMPT, candidates)], [])
    assert [reason for reason, _ in reasons(assembled(of))] == ["not_judged"]
