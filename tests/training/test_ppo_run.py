"""Whole PPO runs on the tiny model: they learn what is rewarded, resume exactly, and stop when only
the reward is pleased."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from preferences.errors import InputError, ServiceError
from preferences.records import Messages
from tests.training.conftest import THINGS, equal, reds, saved_weights, silent, write_split
from training.kl_control import AdaptiveKL, FixedKL
from training.ppo import PPOConfig, train
from training.probe import Probe, ProbeConfig
from training.rollouts import Answer
from training.run import RunFolder, TrainingRuntime

MakePPO = Callable[..., PPOConfig]

EACH = TrainingRuntime(log_steps=1, save_steps=1)
EVERY_TWO = TrainingRuntime(log_steps=2, save_steps=2)


def share_of_red(messages: Messages, answer: str) -> float:
    return reds(answer)


RED = {"red": share_of_red}


@pytest.fixture
def make_ppo(model: str) -> MakePPO:
    """A configuration for the tiny model; keyword arguments change fields."""
    defaults: dict[str, Any] = {
        "model": model,
        "reward_functions": {"red": "colours.py:share_of_red"},
        "temperature": 1.0,
        "max_tokens": 10,
        "rollouts": 64,
        "batch_size": 64,
        "max_length": 48,
        "max_steps": 4,
        "learning_rate": 2e-3,
        "dtype": "float32",
        "gradient_checkpointing": False,
        "probe": None,
    }
    return lambda **changes: PPOConfig(**{**defaults, **changes})


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [line for line in RunFolder(run).metrics() if "score" in line]


def test_what_is_rewarded_is_said_more_and_the_way_there_is_measured(
    make_ppo: MakePPO, red_pairs: Path, tmp_path: Path
) -> None:
    config = make_ppo(weights="full", learning_rate=1e-3, max_steps=12)
    result = train(config, red_pairs, tmp_path / "run", EACH, progress=silent, functions=RED)
    lines = steps_of(tmp_path / "run")
    assert lines[0]["score"] < 0.3  # one colour in five
    assert lines[-1]["score"] > 0.5
    # The first answers are the reference's own.
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert lines[-1]["kl"] > 1
    for line in lines:
        assert line["reward"] == pytest.approx(line["score"] - 0.05 * line["kl"], abs=1e-5)
        assert 0 <= line["clip_share"] <= 1
        assert 1 < line["answer_tokens"] <= 10
        assert 0 <= line["without_end"] <= 1
    assert lines[0]["entropy"] > lines[-1]["entropy"] > 0
    assert {"value_loss", "policy_loss", "update_kl", "kl_coefficient"} <= result.metrics.keys()
    # To 0 in a line: the twelfth step's first update is at 1/12 of the peak.
    assert lines[-1]["learning_rate"] == pytest.approx(1e-3 / 12)


def test_the_saved_policy_says_what_the_trained_one_said(
    make_ppo: MakePPO, red_pairs: Path, tmp_path: Path
) -> None:
    from training.models import load_model, load_tokenizer
    from training.sampling import sample

    config = make_ppo(weights="full", learning_rate=1e-3, max_steps=12)
    train(config, red_pairs, tmp_path / "run", progress=silent, functions=RED)
    policy = load_model(str(tmp_path / "run" / "model"), None, "full", "float32")
    tokenizer = load_tokenizer(config.model, None)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "paint thing40"}], add_generation_prompt=True
    )["input_ids"]
    answers = sample(
        policy,
        tokenizer,
        [asked] * 40,
        ends={tokenizer.eos_token_id},
        max_tokens=10,
        temperature=1.0,
        seed=0,
        batch_size=40,
        bf16=False,
    )
    assert sum(reds(answer.text) for answer in answers) / 40 > 0.6


class Stop(Exception):
    """Ctrl-C, a lost connection of the sampler, a full disk …"""


def test_an_interrupted_run_ends_with_the_weights_and_metrics_of_an_uninterrupted_one(
    make_ppo: MakePPO, red_pairs: Path, red_judge: Any, tmp_path: Path
) -> None:
    config = make_ppo(
        max_steps=7,
        batch_size=16,
        accumulation=2,
        kl=AdaptiveKL(kind="adaptive", target=0.5, horizon=200),
        probe=ProbeConfig(every=3, prompts=6, max_tokens=10, max_malformed=1, max_length_rate=1),
    )
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    expected = train(config, red_pairs, whole, EVERY_TWO, red_judge, None, silent, RED)
    done: list[int] = []

    def stop(step: int, steps: int, metrics: Mapping[str, float]) -> None:
        done.append(step)
        if done == [1, 2, 3, 4, 5]:
            raise Stop

    with pytest.raises(Stop):
        train(config, red_pairs, resumed, EVERY_TWO, red_judge, None, stop, RED)
    result = train(config, red_pairs, resumed, EVERY_TWO, red_judge, None, stop, RED)
    assert done == [1, 2, 3, 4, 5, 5, 6, 7]
    assert result == expected
    assert equal(saved_weights(resumed, result), saved_weights(whole, expected))
    for journal in ("metrics.jsonl", "samples.jsonl", "result.json"):
        assert (resumed / journal).read_bytes() == (whole / journal).read_bytes()
    prices = [line["kl_coefficient"] for line in steps_of(whole)]
    assert len(set(prices)) == len(prices)  # the price moved, so it was part of what was kept


def test_a_torn_checkpoint_costs_the_steps_since_the_one_before(
    make_ppo: MakePPO, red_pairs: Path, tmp_path: Path
) -> None:
    config = make_ppo(max_steps=4)
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    expected = train(config, red_pairs, whole, EACH, progress=silent, functions=RED)

    def stop(step: int, steps: int, metrics: Mapping[str, float]) -> None:
        if step == 3:
            raise Stop

    with pytest.raises(Stop):
        train(config, red_pairs, torn, EACH, progress=stop, functions=RED)
    newest = RunFolder(torn).newest_checkpoint()
    assert newest is not None
    assert newest.step == 2
    with (newest.folder / "training.pt").open("r+b") as file:
        file.truncate(100)
    result = train(config, red_pairs, torn, EACH, progress=silent, functions=RED)
    assert equal(saved_weights(torn, result), saved_weights(whole, expected))


def test_batches_gathered_for_an_update_train_as_one_large_batch(
    make_ppo: MakePPO, red_pairs: Path, tmp_path: Path
) -> None:
    import torch

    class Fixed:
        """The same answers whatever is sampled at once: transformers' noise goes by the batch."""

        def __call__(self, policy: Path, prompts: Sequence[Any], **_: Any) -> list[Answer]:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(policy)
            texts = ("red blue<end>", "green<end>", "white red black<end>", "red red red red<end>")
            ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            return [Answer(tuple(ids[i % 4]), finished=True) for i in range(len(prompts))]

    weights = []
    for batch_size, accumulation in ((16, 1), (4, 4)):
        config = make_ppo(
            rollouts=32, batch_size=batch_size, accumulation=accumulation, max_steps=2
        )
        run = tmp_path / f"{batch_size}"
        result = train(config, red_pairs, run, progress=silent, functions=RED, sampler=Fixed())
        weights.append(saved_weights(run, result))
    moved = max(float(tensor.abs().max()) for n, tensor in weights[0].items() if "lora_B" in n)
    assert moved > 1e-3
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], atol=1e-4 * moved + 1e-6), name


def test_a_sampler_that_was_handed_in_gets_the_policy_of_each_step(
    make_ppo: MakePPO, red_pairs: Path, tmp_path: Path
) -> None:
    seen: list[tuple[dict[str, Any], int]] = []

    def draw(policy: Path, prompts: Sequence[Any], **how: Any) -> list[Answer]:
        from safetensors.torch import load_file

        seen.append((dict(load_file(policy / "adapter_model.safetensors")), how["seed"]))
        assert (how["temperature"], how["max_tokens"]) == (1.0, 10)
        return [Answer((8, 3) if i % 2 else (9, 3), finished=True) for i in range(len(prompts))]

    config, run = make_ppo(max_steps=3), tmp_path / "run"
    result = train(config, red_pairs, run, progress=silent, functions=RED, sampler=draw)
    assert len({seed for _, seed in seen}) == 3
    assert not equal(seen[0][0], seen[1][0])
    assert not equal(seen[2][0], saved_weights(run, result))
    assert not (run / "policy").exists()


@pytest.mark.parametrize(
    ("ids", "finished", "number", "message"),
    [
        ((8, 3), True, 1, "returned 1 answers to 64 prompts"),
        ((8,), True, 64, r"ends with token \(8,\) and is said to be finished"),
        ((8, 3), False, 64, "is said to be cut"),
        ((), True, 64, "ends with token"),
    ],
    ids=["too few", "end token stripped", "end token in what was cut", "nothing"],
)
def test_a_sampler_that_breaks_its_word_is_an_error(
    ids: tuple[int, ...],
    finished: bool,
    number: int,
    message: str,
    make_ppo: MakePPO,
    red_pairs: Path,
    tmp_path: Path,
) -> None:
    def draw(policy: Path, prompts: Sequence[Any], **how: Any) -> list[Answer]:
        return [Answer(ids, finished)] * number

    with pytest.raises(ServiceError, match=message):
        train(make_ppo(), red_pairs, tmp_path / "run", progress=silent, functions=RED, sampler=draw)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            lambda messages, answer: float("nan"),
            r"reward function red: nan for an answer to prompt",
        ),
        (lambda messages, answer: 1 / 0, r"reward function red: ZeroDivisionError on an answer"),
    ],
)
def test_a_reward_function_that_gives_no_number_stops_the_run(
    reward: Any, message: str, make_ppo: MakePPO, red_pairs: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        train(make_ppo(), red_pairs, tmp_path / "run", progress=silent, functions={"red": reward})


def test_what_rewards_has_to_be_named_and_handed_in(
    make_ppo: MakePPO, red_pairs: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="reward_functions: red has to be named there and handed"):
        train(make_ppo(), red_pairs, tmp_path / "a", progress=silent)
    with pytest.raises(InputError, match="nothing rewards the answers"):
        train(make_ppo(reward_functions={}), red_pairs, tmp_path / "b", progress=silent)
    with pytest.raises(InputError, match="holds no adapter of a reward model"):
        train(
            make_ppo(reward_functions={}, reward_model=str(tmp_path)),
            red_pairs,
            tmp_path / "c",
            progress=silent,
        )


def test_scores_of_several_functions_are_added_and_told_apart(
    make_ppo: MakePPO, red_pairs: Path, tmp_path: Path
) -> None:
    config = make_ppo(max_steps=1, reward_functions={"red": "c.py:red", "two": "c.py:two"})
    functions = {**RED, "two": lambda messages, answer: 2.0}
    train(config, red_pairs, tmp_path / "run", EACH, progress=silent, functions=functions)
    (line,) = steps_of(tmp_path / "run")
    assert line["score/two"] == 2.0
    assert line["score"] == pytest.approx(line["score/red"] + 2.0)


def test_answers_that_are_cut_get_the_low_score(
    make_ppo: MakePPO, red_pairs: Path, tmp_path: Path
) -> None:
    # No answer of two colours and more fits into one token.
    config = make_ppo(max_steps=1, max_tokens=1)
    train(config, red_pairs, tmp_path / "run", EACH, progress=silent, functions=RED)
    (line,) = steps_of(tmp_path / "run")
    assert (line["without_end"], line["score"], line["answer_tokens"]) == (1.0, -1.0, 1.0)


def test_a_loss_that_is_no_number_stops_the_run_and_spares_the_checkpoints(
    make_ppo: MakePPO, red_pairs: Path, tmp_path: Path
) -> None:
    import torch

    # One update a step: the first makes the weights huge, the second finds what that does.
    config = make_ppo(learning_rate=1e25, schedule="constant", passes=1)
    run = tmp_path / "run"
    with pytest.raises(ServiceError, match="step 2: the loss or its gradient is not a finite"):
        train(config, red_pairs, run, EACH, progress=silent, functions=RED)
    newest = RunFolder(run).newest_checkpoint()
    assert newest is not None
    saved = torch.load(newest.folder / "training.pt", weights_only=True)["trained"]
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
    # The folder is a run still: it resumes, and says the same.
    with pytest.raises(ServiceError, match="lower learning_rate"):
        train(config, red_pairs, run, EACH, progress=silent, functions=RED)


def half_red(
    prompts: Sequence[Messages], responses: Sequence[str], references: Sequence[str]
) -> list[float | None]:
    """A judge who likes some red, and nothing that is red all over."""

    def worth(text: str) -> float:
        return reds(text) if reds(text) <= 0.7 else -1.0

    return [
        0.5 + 0.5 * ((worth(ours) > worth(theirs)) - (worth(ours) < worth(theirs)))
        for ours, theirs in zip(responses, references, strict=True)
    ]


def test_a_policy_that_pleases_only_its_reward_is_stopped_and_its_best_weights_kept(
    make_ppo: MakePPO, red_pairs: Path, tmp_path: Path
) -> None:
    config = make_ppo(
        weights="full",
        learning_rate=1e-3,
        schedule="constant",
        kl=FixedKL(coefficient=0.0),
        max_steps=40,
        probe=ProbeConfig(
            every=1, prompts=24, max_tokens=12, max_malformed=0.9, max_length_rate=0.9,
            min_win_rate=0, patience=2,
        ),
    )  # fmt: skip
    run = tmp_path / "run"
    result = train(config, red_pairs, run, EACH, half_red, None, silent, RED)
    assert result.stopped_early
    assert result.best_step is not None
    assert result.saved_step == result.best_step < result.steps < 40
    assert result.reason is not None
    assert "over-optimised" in result.reason
    assert "while the win rate fell from" in result.reason
    # The reward saw nothing of it.
    scores = [line["score"] for line in steps_of(run)]
    assert scores[-1] > scores[result.saved_step - 1]

    # Interrupted before its last step, it remembers what the score was before.
    def stop(step: int, steps: int, metrics: Mapping[str, float]) -> None:
        if step == result.steps - 1:
            raise Stop

    again = tmp_path / "again"
    with pytest.raises(Stop):
        train(config, red_pairs, again, EACH, half_red, None, stop, RED)
    assert train(config, red_pairs, again, EACH, half_red, None, silent, RED) == result


def probe(step: int, win_rate: float, error: float = 0.05, breach: str | None = None) -> Probe:
    return Probe(step, 64, 0.0, 0.0, 10.0, 10.0, win_rate, error, 64, breach)


def test_a_win_rate_that_falls_while_the_score_rises_is_over_optimisation() -> None:
    from training.over_optimisation import over_optimised

    probes = [probe(0, 0.5, 0.0), probe(2, 0.8), probe(4, 0.6)]
    # From (.1 + .3)/2 to (.5 + .7)/2; and .8 − .6 = .2 > 1.645·√(.05² + .05²) = .116.
    found = over_optimised(probes, {1: 0.1, 2: 0.3, 3: 0.5, 4: 0.7})
    assert found == (
        "the score rose from 0.2 at step 2 to 0.6 while the win rate fell from 80% to 60%: "
        "over-optimised"
    )
    # The score fell too: it decays, which other thresholds see.
    assert over_optimised(probes, {1: 0.5, 2: 0.7, 3: 0.1, 4: 0.3}) is None
    # .8 − .7 = .1 may be chance.
    scores = {1: 0.1, 2: 0.3, 3: 0.5, 4: 0.7}
    assert over_optimised([*probes[:2], probe(4, 0.7)], scores) is None
    # A probe that was bad itself is no measure.
    bad = [probes[0], probe(2, 0.8, breach="malformed"), probe(4, 0.6)]
    assert over_optimised(bad, scores) is None


def test_a_policy_that_only_ever_lost_is_measured_against_the_reference() -> None:
    from training.over_optimisation import over_optimised

    found = over_optimised([probe(0, 0.5, 0.0), probe(2, 0.3)], {1: 0.1, 2: 0.3})
    assert found is not None
    assert found.startswith("the score rose from 0.1 at step 0 to 0.2")


def test_prompts_without_room_for_an_answer_are_dropped_and_counted(
    make_ppo: MakePPO, tmp_path: Path
) -> None:
    long = " ".join(["paint thing1"] * 20)
    write_split(tmp_path / "d", "train", [("paint thing2", "red", "blue"), (long, "red", "blue")])
    run = tmp_path / "run"
    result = train(make_ppo(max_steps=1), tmp_path / "d", run, progress=silent, functions=RED)
    assert (result.train.rows, result.train.kept) == (2, 1)
    assert result.train.dropped == {"prompt_too_long": 1}
    (dropped,) = [json.loads(line) for line in (run / "dropped.jsonl").read_text().splitlines()]
    assert dropped["reason"] == "prompt_too_long"
    with pytest.raises(InputError, match=r"none of the 2 train prompts leaves room.*max_length"):
        train(
            make_ppo(max_length=11),
            tmp_path / "d",
            tmp_path / "other",
            progress=silent,
            functions=RED,
        )


def test_a_configuration_that_cannot_be_meant_is_refused(make_ppo: MakePPO) -> None:
    with pytest.raises(ValueError, match="rollouts 60 is not a multiple of batch_size"):
        make_ppo(rollouts=60, batch_size=8)
    with pytest.raises(ValueError, match="PPO trains without dropout"):
        make_ppo(lora={"dropout": 0.1})
    with pytest.raises(ValueError, match="PPO has no held-out loss"):
        make_ppo(early_stopping={"metric": "loss"}, probe={})


def test_epochs_are_passes_over_the_prompts(
    make_ppo: MakePPO, red_pairs: Path, tmp_path: Path
) -> None:
    # 24 prompts twice are 48 answers; three steps of 16.
    assert len(THINGS[:24]) == 24
    config = make_ppo(max_steps=None, epochs=2, rollouts=16, batch_size=16)
    result = train(config, red_pairs, tmp_path / "run", progress=silent, functions=RED)
    assert result.steps == result.planned_steps == 3
