"""Judgments that were made elsewhere."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from judging.imported import ImportedJudgments, import_judgments, prompt_of_row
from judging.judge import Group
from judging.ranking import comparisons, rank
from preferences.conversations import imported_candidate
from preferences.errors import InputError
from preferences.partition import Partition
from preferences.records import Dropped, Judgment
from preferences.store import Shard
from tests.judging.groups import group

OF = group("yes", "no", source_id="q1")
YES, NO = (c.candidate_id for c in OF.candidates)


def config(**values: Any) -> ImportedJudgments:
    return ImportedJudgments(kind="import", name="people", source="j.jsonl", **values)


def taken(
    config: ImportedJudgments, *rows: dict[str, Any], of: Group = OF
) -> list[Judgment | Dropped]:
    return list(
        import_judgments(config, [(f"j.jsonl:{n}", r) for n, r in enumerate(rows, 1)], [of])
    )


def row(first: str = "model 0", second: str = "model 1", **said: Any) -> dict[str, Any]:
    return {"prompt_id": "q1", "first": first, "second": second, **said}


def reasons(records: list[Judgment | Dropped]) -> list[str]:
    return [r.reason if isinstance(r, Dropped) else "kept" for r in records]


@pytest.mark.parametrize(
    ("value", "expected"), [(1, 1.0), (2, 0.0), (1.25, 0.75), ("1.5", 0.5), (2.0, 0.0)]
)
def test_a_range_of_two_to_one_says_that_one_is_for_the_first(value: Any, expected: float) -> None:
    # (value - 2) / (1 - 2): 1 gives 1, 2 gives 0 and 1.25 gives 0.75.
    said = config(verdict_in="probability", probability_range=(2, 1))
    (judgment,) = taken(said, row(probability=value))
    assert isinstance(judgment, Judgment)
    assert judgment.probability == pytest.approx(expected)
    assert judgment.candidate_ids == (YES, NO)


@pytest.mark.parametrize("value", [0.99, 2.01, 0, -1])
def test_a_probability_outside_its_range_names_the_place(value: float) -> None:
    said = config(verdict_in="probability", probability_range=(2, 1))
    with pytest.raises(InputError, match=r"j\.jsonl:2: column 'probability' .*outside 1 to 2"):
        taken(said, row(probability=1), row(probability=value))


@pytest.mark.parametrize("value", ["nan", float("inf"), None, "often"])
def test_what_is_no_number_names_the_place(value: Any) -> None:
    with pytest.raises(InputError, match=r"j\.jsonl:1: column 'probability' .*not a finite number"):
        taken(config(verdict_in="probability"), row(probability=value))


def test_a_range_without_width_is_refused() -> None:
    with pytest.raises(ValueError, match="needs two different values"):
        config(probability_range=(1, 1))


def test_verdicts_are_taken_as_they_stand() -> None:
    verdicts = ["first", "second", "tie"]
    found = taken(config(), *(row(verdict=v, judge=v) for v in verdicts))
    assert [j.verdict for j in found if isinstance(j, Judgment)] == verdicts
    with pytest.raises(InputError, match=r"j\.jsonl:1: no verdict 'frist'; did you mean 'first'"):
        taken(config(), row(verdict="frist"))


def test_scores_are_higher_for_the_better() -> None:
    said = row("model 1", "model 0", score_first=2, score_second="7.5")
    (judgment,) = taken(config(verdict_in="scores"), said)
    assert isinstance(judgment, Judgment)
    assert judgment.scores == (2.0, 7.5)
    assert list(comparisons([judgment])) == [(NO, YES, 0.0)]


def test_replies_are_read_by_their_grammar_and_an_unreadable_one_is_a_failure() -> None:
    said = config(verdict_in="reply", grammar="arena_hard")
    first, none = taken(said, row(reply="so: [[B>>A]]", judge="x"), row(reply="B>A", judge="y"))
    assert isinstance(first, Judgment)
    assert isinstance(none, Judgment)
    assert (first.verdict, first.failure) == ("second", None)
    assert (none.verdict, none.failure, none.reply) == (None, "no verdict in reply", "B>A")


def test_likes_are_scores_of_one_answer_each() -> None:
    said = config(format="feedback")
    rows = [
        {"prompt_id": "q1", "response": "yes", "label": "False"},
        {"prompt": "Why?", "response": "model 1", "label": 1},
    ]
    found = [j for j in taken(said, *rows) if isinstance(j, Judgment)]
    assert [(j.kind, j.candidate_ids, j.scores) for j in found] == [
        ("feedback", (YES,), (0.0,)),
        ("feedback", (NO,), (1.0,)),
    ]
    (ranking,) = rank([OF], found)
    assert ranking.mean[1] > ranking.mean[0]
    with pytest.raises(InputError, match=r"j\.jsonl:1: column 'label' .*not true or false"):
        taken(said, {"prompt_id": "q1", "response": "yes", "label": "maybe"})


def test_a_preference_table_says_that_the_chosen_is_better() -> None:
    said = config(format="preferences")
    models = {"chosen_model": "model 1", "rejected_model": "model 0"}
    found = taken(
        said,
        {"prompt": "Why?", "chosen": "no", "rejected": "yes", **models},
        {"prompt": "Why?", "chosen": "same", "rejected": "same"},
        {"prompt": "Another prompt", "chosen": "no", "rejected": "yes"},
    )
    assert reasons(found) == ["kept", "identical_answers", "unknown_prompt"]
    assert isinstance(found[0], Judgment)
    assert list(comparisons(found[:1])) == [(NO, YES, 1.0)]  # type: ignore[arg-type]


def test_what_cannot_be_told_is_dropped_with_the_row() -> None:
    twin = imported_candidate(OF.prompt, "model 0", "another answer")
    of = Group(OF.prompt, (*OF.candidates, twin))
    found = taken(
        config(),
        row("model 9", verdict="first"),
        row("model 0", verdict="first"),
        row("yes", "no", verdict="first"),
        row("yes", "model 1", verdict="second"),
        row("yes", "yes", verdict="tie"),
        row("no", "yes", verdict="second"),
        of=of,
    )
    assert reasons(found) == [
        "unknown_candidate",
        "ambiguous_candidate",
        "kept",
        "duplicate",
        "compares_an_answer_with_itself",
        "kept",
    ]
    details = [r.detail for r in found if isinstance(r, Dropped)]
    assert details[0] == "j.jsonl:1: 'model 9'"
    assert details[2] == "j.jsonl:4"


def test_a_wrong_column_suggests_the_right_one() -> None:
    with pytest.raises(InputError, match=r"j\.jsonl:1: no column 'verdict'; did you mean 'verdit'"):
        taken(config(), row(verdit="first"))


SAYS = {
    "verdict": lambda first_wins: {"verdict": "first" if first_wins else "second"},
    "probability": lambda first_wins: {"probability": 1.1 if first_wins else 1.9},
    "scores": lambda first_wins: {"score_first": 1 + first_wins, "score_second": 2 - first_wins},
    "reply": lambda first_wins: {"reply": "[[A>B]]" if first_wins else "[[B>>A]]"},
}


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from(sorted(SAYS)),
    st.sampled_from([1, 2, 4, 8]),
    st.booleans(),
)
def test_no_preference_flips_on_its_way_in(seed: int, how: str, count: int, by_id: bool) -> None:
    """Planted preferences, through shuffled rows, swapped sides, lost rows and any shards."""
    random = Random(seed)
    groups = [
        group(*(f"answer {m} to {n}" for m in range(3)), question=f"q{n}", source_id=str(n))
        for n in range(10)
    ]
    better: dict[str, dict[str, int]] = {}
    rows = []
    for n, of in enumerate(groups):
        order = random.sample(of.candidates, 3)
        better[of.prompt.prompt_id] = {c.candidate_id: -place for place, c in enumerate(order)}
        for winner, loser in ((0, 1), (0, 2), (1, 2)):
            swapped = random.random() < 0.5
            shown = (order[loser], order[winner]) if swapped else (order[winner], order[loser])
            names = [random.choice([c.model, c.response]) for c in shown]
            about = {"prompt_id": n} if by_id else {"prompt": f"q{n}"}
            rows.append({**about, "first": names[0], "second": names[1], **SAYS[how](not swapped)})
    random.shuffle(rows)
    rows = rows[: random.randrange(15, 31)]
    said = config(verdict_in=how, grammar="arena_hard", probability_range=(2, 1))
    ids = {g.prompt.source_id: g.prompt.prompt_id for g in groups if g.prompt.source_id}
    table = [(f"j.jsonl:{n}", r) for n, r in enumerate(rows, 1)]
    cut = [Shard(index, count) for index in range(count)]
    found: list[Judgment | Dropped] = []
    with Partition(
        iter(table), lambda place, r: prompt_of_row(said, place, r, ids), cut
    ) as partition:
        for shard in cut:
            here = [g for g in groups if g.prompt.prompt_id in shard]
            found += import_judgments(said, partition.rows(shard), here)
    judgments = [j for j in found if isinstance(j, Judgment)]
    assert len(judgments) == len(found) == len(rows)
    for judgment in judgments:
        quality = better[judgment.prompt_id]
        ((first, second, probability),) = comparisons([judgment])
        assert (probability > 0.5) == (quality[first] > quality[second])
        assert probability != 0.5


def test_our_own_ids_name_prompts_and_answers_too() -> None:
    said = {"prompt_id": OF.prompt.prompt_id, "first": NO, "second": YES, "verdict": "first"}
    (judgment,) = taken(config(), said)
    assert isinstance(judgment, Judgment)
    assert judgment.candidate_ids == (NO, YES)


def test_people_are_told_apart_by_the_column_of_the_judge() -> None:
    said = [
        row(verdict="first", judge="ann"),
        row(verdict="second", judge="bob"),
        row(verdict="tie"),
    ]
    found = [j for j in taken(config(people=True), *said) if isinstance(j, Judgment)]
    assert [(j.kind, j.judge, j.annotator) for j in found] == [
        ("human", "people", "ann"),
        ("human", "people", "bob"),
        ("human", "people", None),
    ]
    assert len({j.judgment_id for j in found}) == 3
