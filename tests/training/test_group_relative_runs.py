"""Whole runs of RLOO and GRPO: they learn what is rewarded, and resume exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from preferences.errors import ServiceError
from tests.training.conftest import equal, saved_weights, silent
from tests.training.groups import EACH, RED, lines_of, settings_for, write_two_prompts
from tests.training.test_ppo_run import half_red
from training.group_relative import GRPOConfig, RLOOConfig
from training.probe import ProbeConfig
from training.rewarded import train
from training.rollouts import Answer


@pytest.fixture
def settings(model: str) -> dict[str, Any]:
    return settings_for(model)


@pytest.fixture
def two_prompts(tmp_path: Path) -> Path:
    return write_two_prompts(tmp_path / "two")


@pytest.mark.parametrize("kind", [RLOOConfig, GRPOConfig])
def test_a_constant_reward_teaches_nothing(
    kind: type[Any], settings: dict[str, Any], two_prompts: Path, tmp_path: Path
) -> None:
    config = kind(**{**settings, "max_steps": 2, "beta": 0.0, "missing_end_score": 1.0})
    run = tmp_path / "run"
    functions = {"red": lambda messages, answer: 1.0}
    result = train(config, two_prompts, run, EACH, progress=silent, functions=functions)
    weights = saved_weights(run, result)
    moved = [name for name, tensor in weights.items() if "lora_B" in name and tensor.any()]
    assert moved == []
    assert len(weights) > 2
    assert [line["groups_alike"] for line in lines_of(run)] == [1.0, 1.0]
    assert [line["score"] for line in lines_of(run)] == [1.0, 1.0]


class Stop(Exception):
    """Ctrl-C, a lost connection of the sampler, a full disk …"""


@pytest.mark.parametrize("kind", [RLOOConfig, pytest.param(GRPOConfig, marks=pytest.mark.slow)])
def test_an_interrupted_run_ends_with_the_weights_and_metrics_of_an_uninterrupted_one(
    kind: type[Any], settings: dict[str, Any], red_pairs: Path, red_judge: Any, tmp_path: Path
) -> None:
    # Answers are sampled before steps 1 and 5, and the interruption falls behind the second time.
    config = kind(
        **{
            **settings,
            "rollouts": 16,
            "batch_size": 4,
            "accumulation": 2,
            "passes": 2,
            "max_steps": 7,
            "probe": ProbeConfig(
                every=4, prompts=6, max_tokens=10, max_malformed=1, max_length_rate=1
            ),
        }
    )
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    expected = train(config, red_pairs, whole, EACH, red_judge, None, silent, RED)
    done: list[int] = []

    def stop(step: int, steps: int, metrics: Mapping[str, float]) -> None:
        done.append(step)
        if done == [1, 2, 3, 4, 5, 6]:
            raise Stop

    with pytest.raises(Stop):
        train(config, red_pairs, resumed, EACH, red_judge, None, stop, RED)
    result = train(config, red_pairs, resumed, EACH, red_judge, None, stop, RED)
    assert done == [1, 2, 3, 4, 5, 6, 6, 7]
    assert result == expected
    assert equal(saved_weights(resumed, result), saved_weights(whole, expected))
    for journal in ("metrics.jsonl", "samples.jsonl", "result.json", "curve.svg"):
        assert (resumed / journal).read_bytes() == (whole / journal).read_bytes()
    assert [line["step"] for line in lines_of(whole)] == [1, 5]
    assert not (whole / "policy").exists()


@pytest.mark.parametrize("kind", [GRPOConfig, pytest.param(RLOOConfig, marks=pytest.mark.slow)])
def test_what_is_rewarded_is_said_more_and_the_way_there_is_measured(
    kind: type[Any], settings: dict[str, Any], red_pairs: Path, tmp_path: Path
) -> None:
    sizes = {"rollouts": 64, "batch_size": 64, "max_steps": 12, "learning_rate": 3e-3}
    config = kind(**{**settings, **sizes, "weights": "full", "temperature": 1.0})
    run = tmp_path / "run"
    train(config, red_pairs, run, EACH, progress=silent, functions=RED)
    lines = lines_of(run)
    assert lines[0]["score"] < 0.3  # one colour in five
    assert lines[-1]["score"] > 0.5
    # The first answers are the reference's own.
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert lines[-1]["kl"] > 0.5
    assert lines[0]["entropy"] > lines[-1]["entropy"] > 0
    for line in lines:
        assert 1 < line["answer_tokens"] <= 10
        assert 0 <= line["without_end"] <= 1
        assert 0 <= line["clip_share"] <= 1
    # Twelve times 64/4 prompts are asked of 24.
    assert lines[-1]["epoch"] == pytest.approx(12 * 16 / 24)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory, model: str, red_pairs: Path) -> str:
    """The folder of a reward model of red, an adapter on the tiny model."""
    from training.loop import train as train_any
    from training.reward import RewardConfig

    shared = {key: settings_for(model)[key] for key in ("model", "max_length", "dtype", "probe")}
    config = RewardConfig(
        **shared, learning_rate=5e-3, batch_size=8, max_steps=8, gradient_checkpointing=False
    )
    run = tmp_path_factory.mktemp("judge") / "run"
    train_any(config, red_pairs, run, progress=silent)
    return str(run)


def test_a_reward_model_is_another_adapter_on_the_base_and_not_saved_with_the_policy(
    settings: dict[str, Any], judge: str, red_pairs: Path, tmp_path: Path
) -> None:
    answers = {"rollouts": 64, "batch_size": 64, "reward_samples": 64, "max_steps": 2}
    rewards = {"reward_functions": {}, "reward_model": judge, "missing_end_score": 0.0}
    config = RLOOConfig(**{**settings, **answers, **rewards})
    run = tmp_path / "run"
    result = train(config, red_pairs, run, EACH, progress=silent)
    # Of mean 0 and deviation 1 over the reference's answers, of which the first 64 are others.
    assert abs(lines_of(run)[0]["score"]) < 4 / math.sqrt(64)
    names = saved_weights(run, result)
    assert any("lora_B" in name and bool(tensor.any()) for name, tensor in names.items())
    assert not (run / "adapter" / "reward").exists()
    assert not any("reward" in name or "score" in name for name in names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "weights"), [(RLOOConfig, "lora"), (GRPOConfig, "lora"), (GRPOConfig, "full")]
)
def test_a_run_on_a_reward_model_resumes_exactly(
    kind: type[Any],
    weights: str,
    settings: dict[str, Any],
    judge: str,
    red_pairs: Path,
    tmp_path: Path,
) -> None:
    """Scores are normalised once; the interruption falls between two updates on the same answers,
    and behind a second sampling."""
    sizes = {"rollouts": 16, "batch_size": 4, "accumulation": 2, "max_steps": 5}
    rewards = {"reward_functions": {}, "reward_model": judge, "reward_samples": 32}
    config = kind(**{**settings, **sizes, **rewards, "weights": weights})
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    expected = train(config, red_pairs, whole, EACH, progress=silent)

    def stop(step: int, *_: Any) -> None:
        if step == 4:
            raise Stop

    with pytest.raises(Stop):
        train(config, red_pairs, resumed, EACH, progress=stop)
    result = train(config, red_pairs, resumed, EACH, progress=silent)
    assert result == expected
    assert equal(saved_weights(resumed, result), saved_weights(whole, expected))
    assert (resumed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_a_policy_that_pleases_only_its_reward_is_stopped_and_its_best_weights_kept(
    settings: dict[str, Any], red_pairs: Path, tmp_path: Path
) -> None:
    config = GRPOConfig(
        **{
            **settings,
            "weights": "full",
            "temperature": 1.0,
            "rollouts": 64,
            "batch_size": 64,
            "learning_rate": 3e-3,
            "schedule": "constant",
            "beta": 0.0,
            "max_steps": 60,
            "probe": ProbeConfig(
                every=2, prompts=24, max_tokens=12, max_malformed=0.9, max_length_rate=0.9,
                min_win_rate=0, patience=2,
            ),
        }
    )  # fmt: skip
    run = tmp_path / "run"
    result = train(config, red_pairs, run, EACH, half_red, None, silent, RED)
    assert result.reason is not None
    assert "over-optimised" in result.reason
    assert result.saved_step == result.best_step
    assert result.steps < 60
    # The reward saw nothing of it.
    scores = {line["step"]: line["score"] for line in lines_of(run)}
    assert scores[result.steps] > scores[result.saved_step]


def test_a_sampler_that_breaks_its_word_is_an_error(
    settings: dict[str, Any], two_prompts: Path, tmp_path: Path
) -> None:
    def draw(policy: Path, prompts: Sequence[Any], **how: Any) -> list[Answer]:
        return [Answer((8,), finished=True)] * len(prompts)

    config = GRPOConfig(**settings)
    with pytest.raises(ServiceError, match=r"ends with token \(8,\) and is said to be finished"):
        train(config, two_prompts, tmp_path / "r", progress=silent, functions=RED, sampler=draw)
