"""ORPO's loss is the paper's, its numbers are right where p is near 1, and runs learn by it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from preferences.errors import InputError
from tests.training.conftest import (
    EVERY_FOUR,
    QUICK,
    assert_an_interruption_changes_nothing,
    saved_weights,
    silent,
    write_split,
)
from training.evaluation import implicit_reward_accuracy
from training.loop import train
from training.models import load_tokenizer
from training.orpo import ORPOConfig, build_trainer, load_data
from training.probe import ProbeConfig
from training.run import TrainingRuntime

Vector = NDArray[np.float64]


def loss_from_odds(chosen: Vector, rejected: Vector, weight: float) -> Vector:
    """Equations 1, 6 and 7 of the paper as they stand, from probabilities and odds."""
    p, q = np.exp(chosen), np.exp(rejected)
    ratio = (p / (1 - p)) / (q / (1 - q))
    sigmoid = 1 / (1 + np.exp(-np.log(ratio)))
    value: Vector = -np.log(p) - weight * np.log(sigmoid)
    return value


def test_the_loss_and_its_gradients_are_the_papers() -> None:
    import torch

    from training.odds_ratio import odds_ratio_loss

    chance = np.random.default_rng(0)
    chosen, rejected = -chance.uniform(0.05, 4, 200), -chance.uniform(0.05, 4, 200)
    ours = [torch.tensor(v, requires_grad=True) for v in (chosen, rejected)]
    losses, likelihood, ratio = odds_ratio_loss(ours[0], ours[1], weight=0.3)
    assert losses.detach().numpy() == pytest.approx(loss_from_odds(chosen, rejected, 0.3), rel=1e-6)
    assert likelihood.detach().numpy() == pytest.approx(-chosen)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    # By hand, with z the log odds ratio: dz/d log p = 1/(1 - p), and -log σ(z) falls by σ(-z).
    p, q = np.exp(chosen), np.exp(rejected)
    falls = 0.3 / (1 + np.exp(ratio.detach().numpy()))
    assert ours[0].grad is not None
    assert ours[1].grad is not None
    assert ours[0].grad.numpy() == pytest.approx(-1 - falls / (1 - p), rel=1e-6)
    assert ours[1].grad.numpy() == pytest.approx(falls / (1 - q), rel=1e-6)


def test_equal_answers_cost_their_likelihood_and_weight_times_ln_2() -> None:
    import torch

    from training.odds_ratio import odds_ratio_loss

    same = torch.tensor([-0.7], dtype=torch.float64)
    losses, _, ratio = odds_ratio_loss(same, same, weight=0.5)
    # The odds are equal, their ratio's logarithm is 0 and -log σ(0) = ln 2.
    assert float(ratio) == 0
    assert float(losses) == pytest.approx(0.7 + 0.5 * math.log(2), rel=1e-12)


@pytest.mark.parametrize("near", [1e-3, 1e-6, 1e-9, 1e-12])
def test_near_certainty_the_log_odds_keep_their_digits(near: float) -> None:
    import torch

    from training.odds_ratio import log_odds

    log_p = torch.tensor([-near], dtype=torch.float64, requires_grad=True)
    odds = log_odds(log_p)
    # log(p/(1-p)) with 1 - p = 1 - e^-x = x - x²/2 + x³/6 - x⁴/24 + …
    one_less = near - near**2 / 2 + near**3 / 6 - near**4 / 24
    assert float(odds.detach()) == pytest.approx(-near - math.log(one_less), rel=1e-12)
    odds.sum().backward()  # type: ignore[no-untyped-call]
    assert log_p.grad is not None
    assert float(log_p.grad) == pytest.approx(1 / one_less, rel=1e-9)


@pytest.mark.parametrize(
    ("chosen", "rejected"), [(-1e-4, -2.0), (-2.0, -1e-4), (-1e-4, -1e-4), (-30.0, -1e-3)]
)
def test_gradients_agree_with_finite_differences(chosen: float, rejected: float) -> None:
    import torch

    from training.odds_ratio import odds_ratio_loss

    def loss(*log_probs: Any) -> Any:
        return odds_ratio_loss(log_probs[0], log_probs[1], weight=0.7)[0]

    point = [torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (chosen, rejected)]
    assert torch.autograd.gradcheck(loss, point, eps=1e-8, atol=1e-4, rtol=1e-4)


def test_an_answer_that_is_certain_costs_and_teaches_something_finite() -> None:
    import torch

    from training.odds_ratio import odds_ratio_loss

    for values in ((0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-200.0, 0.0)):
        point = [torch.tensor([v], requires_grad=True) for v in values]
        losses, *_ = odds_ratio_loss(point[0], point[1], weight=0.1)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        gradients = torch.cat([p.grad for p in point if p.grad is not None])
        assert torch.isfinite(losses).all(), values
        assert torch.isfinite(gradients).all(), values
        assert gradients[0] < 0, values  # still towards the chosen
        assert gradients[1] >= 0, values  # and away from the rejected


def test_the_optimum_over_all_policies_is_the_one_found_without_our_loss() -> None:
    # Answers of one token, so that a policy is a point of the simplex; pairs by Bradley-Terry.
    import torch
    from scipy.optimize import minimize  # type: ignore[import-untyped]

    from training.odds_ratio import odds_ratio_loss

    chance = np.random.default_rng(1)
    size, weight = 6, 0.5
    reward = chance.normal(0, 1, size)
    first, second = (grid.ravel() for grid in np.meshgrid(range(size), range(size)))
    first, second = first[first != second], second[first != second]
    share = 1 / (1 + np.exp(reward[second] - reward[first])) / len(first) * 2

    def expected(policy: Vector) -> float:
        logs = np.log(policy)
        return float(share @ loss_from_odds(logs[first], logs[second], weight))

    found = minimize(
        expected,
        np.full(size, 1 / size),
        method="SLSQP",
        bounds=[(1e-6, 1 - 1e-6)] * size,
        constraints={"type": "eq", "fun": lambda policy: policy.sum() - 1},
        options={"ftol": 1e-15, "maxiter": 500},
    )
    assert found.success
    logits = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, history_size=20)
    shares = torch.tensor(share)

    def step() -> Any:
        optimizer.zero_grad()
        logs = logits.log_softmax(0)
        loss = shares @ odds_ratio_loss(logs[first], logs[second], weight)[0]
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    for _ in range(5):
        optimizer.step(step)  # type: ignore[no-untyped-call]
    policy = logits.detach().softmax(0).numpy()
    assert policy == pytest.approx(found.x, abs=1e-5)
    kl = float((policy * np.log(policy / found.x)).sum())
    assert kl < 1e-8
    # The better an answer, the likelier; and the best is not all there is.
    assert list(np.argsort(policy)) == list(np.argsort(reward))
    assert policy.max() < 0.9


MakeORPO = Callable[..., ORPOConfig]


@pytest.fixture
def make_orpo(model: str) -> MakeORPO:
    """A configuration for the tiny model; keyword arguments change fields."""
    settings: dict[str, Any] = {
        "model": model,
        "weights": "full",
        "odds_ratio_weight": 0.5,
        **QUICK,
        "probe": None,
    }
    return lambda **changes: ORPOConfig(**{**settings, **changes})


def trainer_for(config: ORPOConfig, dataset: Path, output: Path) -> Any:
    pairs, _ = load_data(config, dataset, load_tokenizer(config.model, None))
    assert pairs is not None
    return build_trainer(config, TrainingRuntime(), output, pairs, None)


def batch_loss(trainer: Any, rows: list[dict[str, Any]]) -> float:
    """Through the collator and the loss that trains."""
    trainer.model.eval()
    return float(trainer.compute_loss(trainer.model, trainer.data_collator(rows)).detach())


def mean_log_prob(model: Any, prompt: str, answer: str, tokenizer: Any) -> float:
    """log π(answer + <end> | prompt) over its tokens' number, with nothing of ours or of TRL's."""
    import torch

    ids = tokenizer(f"<bos><user>{prompt}<end>\n<assistant>", add_special_tokens=False)["input_ids"]
    answered = tokenizer(f"{answer}<end>", add_special_tokens=False)["input_ids"]
    total = 0.0
    for i, token in enumerate(answered):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + answered[:i]])).logits[0, -1].double()
        total += float(logits[token] - torch.logsumexp(logits, 0))
    return total / len(answered)


PAIRS = [
    ("paint thing1", "red red", "blue"),
    ("paint thing2 thing3 thing4", "red", "green white blue black blue"),
    ("paint thing5", "white red blue", "red"),
]


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_the_trained_loss_counts_the_answers_tokens_alone_and_pairs_alike(
    weights: str, make_orpo: MakeORPO, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    write_split(tmp_path, "train", PAIRS)
    config = make_orpo(weights=weights)
    trainer = trainer_for(config, tmp_path, tmp_path / "run")
    # Before any step the policy is the model as it was, with its adapter or without.
    base = AutoModelForCausalLM.from_pretrained(config.model).eval()
    logs = np.array(
        [
            [mean_log_prob(base, prompt, a, trainer.processing_class) for a in answers]
            for prompt, *answers in PAIRS
        ]
    )
    expected = loss_from_odds(logs[:, 0], logs[:, 1], config.odds_ratio_weight)
    rows = [trainer.train_dataset[n] for n in range(3)]
    for row, loss in zip(rows, expected, strict=True):
        assert batch_loss(trainer, [row]) == pytest.approx(loss, rel=2e-5)
    # The mean over pairs, whatever their lengths and the padding they need beside each other.
    assert batch_loss(trainer, rows) == pytest.approx(expected.mean(), rel=2e-5)


def test_batches_of_an_update_may_be_cut_smaller(make_orpo: MakeORPO, tmp_path: Path) -> None:
    write_split(tmp_path, "train", [*PAIRS, ("paint thing6", "red blue", "blue red green")])
    trained = []
    for batch, accumulation in ((4, 1), (1, 4)):
        config = make_orpo(batch_size=batch, accumulation=accumulation, max_steps=2)
        run = tmp_path / f"of {batch}"
        result = train(config, tmp_path, run, EVERY_FOUR, progress=silent)
        trained.append((saved_weights(run, result), result.metrics["loss"]))
    (whole, loss), (parts, same) = trained
    assert same == pytest.approx(loss, rel=1e-5)
    for name, weights in whole.items():
        # Of two steps of 2e-3; AdamW makes much of the rounding of gradients near 0.
        assert parts[name] == pytest.approx(weights, abs=1e-4), name


def test_pairs_that_prefer_red_make_the_policy_say_red(
    make_orpo: MakeORPO, red_pairs: Path, red_judge: Any, tmp_path: Path
) -> None:
    probe = ProbeConfig(
        every=12, prompts=24, max_tokens=12, max_malformed=0.9, max_length_rate=0.9, min_win_rate=0
    )
    config = make_orpo(max_steps=24, probe=probe)
    run = tmp_path / "run"
    result = train(config, red_pairs, run, EVERY_FOUR, red_judge, progress=silent)
    last = result.probes[-1]
    assert last.win_rate is not None
    assert last.win_rate > 0.65
    assert result.evaluation["eval_rewards/accuracies"] > 0.9
    assert result.evaluation["eval_log_odds_ratio"] > 1
    assert implicit_reward_accuracy(config, run, red_pairs).accuracy.mean > 0.9


def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(
    make_orpo: MakeORPO, red_pairs: Path, tmp_path: Path
) -> None:
    config = make_orpo(
        weights="lora", batch_size=2, accumulation=2, lora={"rank": 4, "dropout": 0.2}
    )
    assert_an_interruption_changes_nothing(config, red_pairs, tmp_path)


def test_an_answer_without_tokens_is_refused(make_orpo: MakeORPO, tmp_path: Path) -> None:
    config = make_orpo()
    tokenizer = load_tokenizer(config.model, None)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    )
    tokenizer.chat_template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    write_split(tmp_path, "train", [("paint thing1", "red", "")])
    with pytest.raises(InputError, match=r"p-paint thing1: an answer has no tokens.*remove the"):
        load_data(config, tmp_path, tokenizer)
