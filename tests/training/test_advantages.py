"""Rewards, advantages and losses against numbers worked out by hand, arithmetic shown."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from training.advantages import (
    end_scores,
    explained_variance,
    generalised_advantages,
    kl_per_token,
    masked_mean,
    place_rewards,
    policy_losses,
    value_losses,
    whiten,
)
from training.kl_control import AdaptiveKL, FixedKL, next_coefficient

# Two answers in rows of four: the first has three tokens after one of its prompt, the second one.
MASK = torch.tensor([[False, True, True, True], [True, False, False, False]])


def close(tensor: Tensor, rows: list[list[float]]) -> bool:
    return torch.allclose(tensor.double(), torch.tensor(rows, dtype=torch.double), atol=1e-6)


def test_the_kl_of_a_token_is_its_log_ratio_and_padding_has_none() -> None:
    ours = torch.tensor([[-9.0, -1.0, -2.0, -0.5], [-1.0, -9.0, -9.0, -9.0]])
    theirs = torch.tensor([[-1.0, -1.5, -1.0, -0.5], [-3.0, -1.0, -1.0, -1.0]])
    # −1 − −1.5 = .5; −2 − −1 = −1 (a single one may be negative); equal is 0; −1 − −3 = 2.
    assert close(kl_per_token(ours, theirs, MASK), [[0, 0.5, -1.0, 0], [2.0, 0, 0, 0]])


def test_over_all_answers_the_kl_of_tokens_has_the_exact_kl_as_its_mean() -> None:
    ours, theirs = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    rows = kl_per_token(ours.log()[:, None], theirs.log()[:, None], torch.ones(3, 1).bool())
    exact = 0.7 * math.log(0.7 / 0.3) + 0.2 * math.log(0.2 / 0.3) + 0.1 * math.log(0.1 / 0.4)
    assert float((ours * rows[:, 0]).sum()) == pytest.approx(exact)


def test_kl_is_charged_at_every_token_and_the_score_paid_at_the_last_alone() -> None:
    kl = torch.tensor([[7.0, 0.5, -1.0, 0.0], [2.0, 7.0, 7.0, 7.0]])
    rewards = place_rewards(kl, torch.tensor([3.0, -1.0]), MASK, coefficient=0.1)
    # −.1 × .5, −.1 × −1, −.1 × 0 + 3; −.1 × 2 − 1. What stands outside the answers counts nothing.
    assert close(rewards, [[0, -0.05, 0.1, 3.0], [-1.2, 0, 0, 0]])


def test_an_answer_that_fills_the_row_is_paid_at_its_last_column() -> None:
    mask = torch.ones(1, 2).bool()
    assert close(place_rewards(torch.zeros(1, 2), torch.tensor([5.0]), mask, 1.0), [[0, 5.0]])


def test_an_answer_without_an_end_gets_the_low_score_in_place_of_its_own() -> None:
    scores = end_scores(torch.tensor([2.0, 9.0]), torch.tensor([True, False]), missing=-1.0)
    assert scores.tolist() == [2.0, -1.0]


def test_advantages_are_discounted_sums_of_surprises() -> None:
    rewards = torch.tensor([[0.0, 1.0, 0.0, 2.0], [3.0, 0.0, 0.0, 0.0]])
    values = torch.tensor([[9.0, 0.5, 1.0, 4.0], [1.0, 9.0, 9.0, 9.0]])
    advantages, returns = generalised_advantages(rewards, values, MASK, gamma=0.9, lam=0.5)
    # Row 1: δ3 = 2 + .9·0 − 4 = −2          A3 = −2
    #        δ2 = 0 + .9·4 − 1 = 2.6         A2 = 2.6 + .9·.5·−2 = 1.7
    #        δ1 = 1 + .9·1 − .5 = 1.4        A1 = 1.4 + .45·1.7 = 2.165
    # Row 2: δ0 = 3 − 1 = 2; the 9s after its end are padding. Returns are A + V.
    assert close(advantages, [[0, 2.165, 1.7, -2.0], [2.0, 0, 0, 0]])
    assert close(returns, [[0, 2.665, 2.7, 2.0], [3.0, 0, 0, 0]])


def test_with_lambda_and_gamma_1_a_return_is_the_sum_of_what_is_still_to_come() -> None:
    rewards = torch.tensor([[9.0, -0.1, -0.2, 1.0]]) * MASK[:1]
    _, returns = generalised_advantages(rewards, torch.randn(1, 4), MASK[:1], 1.0, 1.0)
    assert close(returns, [[0, 0.7, 0.8, 1.0]])


def test_with_lambda_0_an_advantage_is_its_own_surprise() -> None:
    rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 5.0]])
    advantages, _ = generalised_advantages(rewards, values, torch.ones(1, 2).bool(), 1.0, 0.0)
    assert close(advantages, [[3.0, -4.0]])  # 0 + 5 − 2; 1 − 5


def test_advantages_know_nothing_of_padding() -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 6), torch.randn(2, 6)
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    padded, _ = generalised_advantages(rewards * mask, values, mask, 1.0, 0.95)
    alone, _ = generalised_advantages(rewards[:1, :4], values[:1, :4], mask[:1, :4], 1.0, 0.95)
    assert torch.allclose(padded[:1, :4], alone)
    assert not padded[0, 4:].any()


def test_whitening_looks_at_tokens_of_answers_only() -> None:
    values = torch.tensor([[99.0, 1.0, 2.0, 3.0], [6.0, 99.0, 99.0, 99.0]])
    # Mean (1 + 2 + 3 + 6)/4 = 3; variance (4 + 1 + 0 + 9)/4 = 3.5.
    unit = 1 / math.sqrt(3.5)
    assert close(whiten(values, MASK), [[0, -2 * unit, -unit, 0], [3 * unit, 0, 0, 0]])
    assert float(masked_mean(values, MASK)) == 3.0


def test_equal_advantages_teach_nothing() -> None:
    assert not whiten(torch.full((2, 4), 0.3), MASK).any()


def test_the_surrogate_is_cut_where_going_on_would_gain() -> None:
    mask = torch.ones(1, 4).bool()
    old = torch.zeros(1, 4)
    new = torch.tensor([[1.5, 1.5, 0.5, 0.5]]).log()  # the ratios
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    losses, clipped = policy_losses(new, old, advantages, mask, clip=0.2)
    # ρ 1.5, A +: max(−1.5, −1.2) = −1.2, cut.     ρ 1.5, A −: max(1.5, 1.2) = 1.5, not cut.
    # ρ .5,  A +: max(−.5, −.8) = −.5, not cut.    ρ .5,  A −: max(.5, .8) = .8, cut.
    assert close(losses, [[-1.2, 1.5, -0.5, 0.8]])
    assert clipped.tolist() == [[True, False, False, True]]


def test_padding_has_no_loss_whatever_stands_there() -> None:
    new = torch.tensor([[800.0, -1.0]], requires_grad=True)
    mask = torch.tensor([[False, True]])
    losses, _ = policy_losses(new, torch.full((1, 2), -1.0), torch.ones(1, 2), mask, 0.2)
    losses.sum().backward()
    # At ratio 1 the gradient of −A·ρ with respect to log π is −A = −1.
    assert losses.tolist() == [[0.0, -1.0]]
    assert new.grad is not None
    assert new.grad.tolist() == [[0.0, -1.0]]


def test_a_value_that_moved_too_far_is_measured_where_it_was_allowed_to_be() -> None:
    mask = torch.ones(1, 3).bool()
    values = torch.tensor([[1.0, 0.1, -1.0]], requires_grad=True)
    losses, clipped = value_losses(values, torch.zeros(1, 3), torch.ones(1, 3), mask, clip=0.2)
    # V 1 against R 1: free (1 − 1)² = 0, cut to .2: (.2 − 1)² = .64; half the larger is .32.
    # V .1 is within ±.2: (.1 − 1)² = .81, half is .405.
    # V −1, cut to −.2: free (−1 − 1)² = 4 is larger than (−.2 − 1)² = 1.44; half is 2.
    assert close(losses.detach(), [[0.32, 0.405, 2.0]])
    assert clipped.tolist() == [[True, False, False]]
    losses.sum().backward()
    assert values.grad is not None
    assert close(values.grad, [[0.0, -0.9, -2.0]])  # where it is cut, nothing pulls any more


def test_explained_variance_is_1_for_a_perfect_critic_and_0_for_a_constant_one() -> None:
    returns = torch.tensor([[0.0, 1.0, 2.0, 3.0], [6.0, 0.0, 0.0, 0.0]])
    assert float(explained_variance(returns, returns, MASK)) == 1.0
    assert float(explained_variance(torch.full((2, 4), 7.0), returns, MASK)) == pytest.approx(0.0)
    # Off by −1, 1, −1, 1: Var(R − V) = 1 and Var(R) = 3.5, as above.
    off = returns - torch.tensor([[0.0, -1, 1, -1], [1, 0, 0, 0]])
    assert float(explained_variance(off, returns, MASK)) == pytest.approx(1 - 1 / 3.5)


def test_the_adaptive_price_follows_the_kl_within_its_bounds() -> None:
    control = AdaptiveKL(kind="adaptive")
    assert (control.coefficient, control.target, control.horizon) == (0.15, 6.0, 10_000)
    # 6.6 nats are .1 too many: × (1 + .1·512/10000) = 1.00512.
    assert next_coefficient(control, 0.15, 6.6, 512) == pytest.approx(0.15 * 1.00512)
    # 60 nats count as .2 too many and none as .2 too few: × (1 ± .2·512/10000) = 1 ± .01024.
    assert next_coefficient(control, 0.15, 60.0, 512) == pytest.approx(0.15 * 1.01024)
    assert next_coefficient(control, 0.15, 0.0, 512) == pytest.approx(0.15 * 0.98976)
    assert next_coefficient(control, 0.15, 6.0, 512) == 0.15


def test_the_price_never_turns_negative() -> None:
    control = AdaptiveKL(kind="adaptive", horizon=10)
    # 1 − .2·100/10 = −1 would pay for leaving the reference.
    assert next_coefficient(control, 0.15, 0.0, 100) == 0.0


def test_a_fixed_price_stays() -> None:
    assert next_coefficient(FixedKL(), 0.05, 60.0, 512) == 0.05
