"""Coefficients of agreement, against published examples and independent arithmetic."""

from __future__ import annotations

from itertools import permutations
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from judging.coefficients import (
    Coefficient,
    add_unit,
    cohen_kappa,
    decided_agreement,
    krippendorff_alpha,
    pairwise_agreement,
)

# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability": four observers, twelve units,
# five classes, 0 where an observer said nothing.
OBSERVERS = (
    (1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0),
    (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3),
    (0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0),
    (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0),
)
UNITS = [[said - 1 for said in unit if said] for unit in zip(*OBSERVERS, strict=True)]


def coincidences(units: list[list[int]], classes: int) -> list[list[float]]:
    """The coincidence matrix of units, each with its verdicts."""
    matrix = [[0.0] * classes for _ in range(classes)]
    for unit in units:
        add_unit(matrix, unit)
    return matrix


def test_the_coincidences_of_krippendorffs_example_are_his() -> None:
    assert coincidences(UNITS, 5) == [
        pytest.approx(row)
        for row in (
            [7, 4 / 3, 1 / 3, 1 / 3, 0],
            [4 / 3, 10, 4 / 3, 1 / 3, 0],
            [1 / 3, 4 / 3, 8, 1 / 3, 0],
            [1 / 3, 1 / 3, 1 / 3, 4, 0],
            [0, 0, 0, 0, 3],
        )
    ]


def test_krippendorffs_alpha_is_the_published_one() -> None:
    matrix = coincidences(UNITS, 5)
    nominal, ordinal = (krippendorff_alpha(matrix, level) for level in ("nominal", "ordinal"))
    assert nominal.value == pytest.approx(0.743, abs=0.0005)
    assert ordinal.value == pytest.approx(0.815, abs=0.0005)


def test_krippendorffs_alpha_of_two_observers_is_the_published_one() -> None:
    # The same paper, its binary example: two observers, ten units, coincidences 10, 4, 4, 2.
    units = [[int(a), int(b)] for a, b in zip("0100000000", "1110010100", strict=True)]
    assert coincidences(units, 2) == [[10, 4], [4, 2]]
    # 1 - (20 - 1) * 4 / (14 * 6) = 0.095.
    found = krippendorff_alpha(coincidences(units, 2))
    assert found.value == pytest.approx(1 - 19 * 4 / (14 * 6))
    assert found.value == pytest.approx(0.095, abs=0.0005)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=12))
def test_alpha_is_one_minus_the_ratio_of_mean_disagreements(units: list[list[int]]) -> None:
    # An implementation from the definition: D_o is the mean over the pairable values of their mean
    # distance to the others of their unit, D_e the mean distance over all pairs of values.
    pairable = [unit for unit in units if len(unit) > 1]
    values = [value for unit in pairable for value in unit]
    for level in ("nominal", "ordinal"):
        tally = [values.count(n) for n in range(3)]

        def distance(a: int, b: int, level: str = level, tally: list[int] = tally) -> float:
            if level == "nominal":
                return float(a != b)
            low, high = min(a, b), max(a, b)
            return (sum(tally[low : high + 1]) - (tally[a] + tally[b]) / 2) ** 2

        observed = np.mean(
            [
                np.mean([distance(unit[n], unit[m]) for m in range(len(unit)) if m != n])
                for unit in pairable
                for n in range(len(unit))
            ]
            or [0]
        )
        expected = np.mean([distance(a, b) for a, b in permutations(values, 2)] or [0])
        found = krippendorff_alpha(coincidences(units, 3), level)  # type: ignore[arg-type]
        if not pairable or len(set(values)) == 1:
            assert found.value is None
            assert found.missing
        else:
            assert found.value == pytest.approx(1 - observed / expected)


@given(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=4), min_size=2, max_size=10))
def test_alpha_does_not_depend_on_which_answer_is_called_the_first(units: list[list[int]]) -> None:
    turned = [[2 - verdict for verdict in unit] for unit in units]
    for level in ("nominal", "ordinal"):
        one = krippendorff_alpha(coincidences(units, 3), level)  # type: ignore[arg-type]
        other = krippendorff_alpha(coincidences(turned, 3), level)  # type: ignore[arg-type]
        assert other.missing == one.missing
        assert other.value == (None if one.value is None else pytest.approx(one.value))


def test_a_win_against_a_loss_hurts_ordinal_alpha_more_than_a_win_against_a_tie() -> None:
    agreed = [[0, 0], [1, 1], [2, 2]] * 4
    opposed = krippendorff_alpha(coincidences([*agreed, [0, 2]], 3), "ordinal").value
    near = krippendorff_alpha(coincidences([*agreed, [1, 2]], 3), "ordinal").value
    assert opposed is not None
    assert near is not None
    assert opposed < near
    same = [krippendorff_alpha(coincidences([*agreed, u], 3)).value for u in ([0, 2], [2, 0])]
    assert same[0] == same[1]


def test_cohens_kappa_is_the_arithmetic() -> None:
    # 50 pairs: they agree on 20 + 15 = 0.7. The one prefers the first in 25 of 50, the other in 30:
    # by chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5. Kappa (0.7 - 0.5) / (1 - 0.5) = 0.4.
    found = cohen_kappa([[20, 5], [10, 15]])
    assert found.value == pytest.approx(0.4)
    assert cohen_kappa([[3, 0, 0], [0, 4, 0], [0, 0, 5]]) == Coefficient(1.0)


def test_cohens_kappa_of_three_classes_is_the_published_one() -> None:
    # Gwet 2014, "Handbook of Inter-Rater Reliability": 100 subjects, kappa 0.6765. Agreement 0.89;
    # by chance 0.8 * 0.8 + 0.1 * 0.05 + 0.1 * 0.15 = 0.66; (0.89 - 0.66) / 0.34.
    found = cohen_kappa([[75, 1, 4], [5, 4, 1], [0, 0, 10]])
    assert found.value == pytest.approx(0.6765, abs=0.00005)


def test_raters_who_guess_have_a_kappa_and_an_alpha_of_about_nothing() -> None:
    draw = Random(0)
    table, units = [[0.0] * 3 for _ in range(3)], []
    for _ in range(20_000):
        one, other = draw.choices(range(3), weights=[5, 1, 4], k=2)
        table[one][other] += 1
        units.append([one, other])
    # The standard error is about 1 / sqrt(20,000) = 0.007.
    assert cohen_kappa(table).value == pytest.approx(0, abs=0.03)
    assert krippendorff_alpha(coincidences(units, 3)).value == pytest.approx(0, abs=0.03)


def test_a_tie_agrees_with_a_tie_alone() -> None:
    # Second, tie, first: 2 + 3 + 4 of 15 are the same; without ties 2 + 4 of 7.
    table = [[2, 1, 0], [2, 3, 1], [1, 1, 4]]
    assert pairwise_agreement(table).value == pytest.approx(9 / 15)
    assert decided_agreement(table, tie=1).value == pytest.approx(6 / 7)


@pytest.mark.parametrize("coefficient", [krippendorff_alpha, cohen_kappa, pairwise_agreement])
def test_without_verdicts_by_two_raters_there_is_no_coefficient(coefficient: object) -> None:
    assert callable(coefficient)
    found = coefficient([[0.0] * 3 for _ in range(3)])
    assert found == Coefficient(None, "nothing judged by two")
    assert decided_agreement([[0.0] * 3 for _ in range(3)], 1) == found


def test_where_only_ties_occur_there_is_agreement_but_nothing_beyond_chance() -> None:
    ties = [[0, 0, 0], [0, 8, 0], [0, 0, 0]]
    assert pairwise_agreement(ties) == Coefficient(1.0)
    assert decided_agreement(ties, 1) == Coefficient(None, "no pair without a tie")
    assert cohen_kappa(ties) == Coefficient(None, "only one verdict occurs")
    assert krippendorff_alpha(ties) == Coefficient(None, "only one verdict occurs")
    assert krippendorff_alpha(ties, "ordinal") == Coefficient(None, "only one verdict occurs")


def test_a_rater_who_always_says_the_same_agrees_by_chance_alone() -> None:
    # The second always says first: agreement 6/10 is what chance gives, 0.6 * 1.
    found = cohen_kappa([[0, 0, 3], [0, 0, 1], [0, 0, 6]])
    assert found.value == pytest.approx(0)
    # Two raters who each always say the same, but not the same as each other, never agree.
    assert cohen_kappa([[0, 0, 0], [0, 0, 0], [7, 0, 0]]).value == 0


def test_a_unit_with_one_verdict_adds_nothing() -> None:
    assert coincidences([[1], [], [2]], 3) == [[0.0] * 3 for _ in range(3)]
