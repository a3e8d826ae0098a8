"""One base carries policy, reference, reward and critic, and each says what it would say alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from preferences.errors import InputError
from preferences.records import Messages
from tests.training.conftest import equal, reds, saved_weights, silent
from training.data import HeldOutPrompt, held_out_prompt
from training.loop import train as train_any
from training.ppo import PPOConfig, build_trainer, load_data, train
from training.reward import RewardConfig, publish_reward_model
from training.rollouts import Answer, as_rollouts, prompts_of_step, seed_of_step
from training.run import RunFolder, TrainingRuntime

END = 3


def ppo(model: str, **changes: Any) -> PPOConfig:
    settings: dict[str, Any] = {
        "model": model,
        "reward_functions": {"red": "colours.py:red"},
        "temperature": 1.0,
        "max_tokens": 10,
        "rollouts": 16,
        "batch_size": 16,
        "max_length": 48,
        "max_steps": 2,
        "learning_rate": 5e-3,
        "dtype": "float32",
        "gradient_checkpointing": False,
        "probe": None,
    }
    return PPOConfig(**(settings | changes))


def share_of_red(messages: Messages, answer: str) -> float:
    return reds(answer)


RED = {"red": share_of_red}
EACH = TrainingRuntime(log_steps=1, save_steps=1)


def prompt(thing: str, tokenizer: Any) -> HeldOutPrompt:
    return held_out_prompt(thing, [{"role": "user", "content": f"paint {thing}"}], tokenizer)


def answers_of(tokenizer: Any, *texts: str) -> list[Answer]:
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [Answer(tuple(row), finished=row[-1] == END) for row in ids]


def trainer_for(config: PPOConfig, dataset: Path, output: Path) -> Any:
    from training.models import load_tokenizer

    prompts, _ = load_data(config, dataset, load_tokenizer(config.model, None))
    assert prompts is not None
    return build_trainer(config, TrainingRuntime(), output, prompts, None)


def log_probs_one_by_one(
    model: Any, asked: tuple[int, ...], answer: Answer, temperature: float
) -> list[float]:
    """Token by token, with nothing of ours."""
    import torch

    found = []
    for i, token in enumerate(answer.ids):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([asked + answer.ids[:i]])).logits[0, -1]
        found.append(float((logits / temperature).log_softmax(0)[token]))
    return found


def test_every_token_has_the_log_probability_and_entropy_of_the_policy_that_was_sampled(
    model: str, red_pairs: Path, tmp_path: Path
) -> None:
    import torch

    from training.actors import read_policy, read_reference

    trainer = trainer_for(ppo(model).given(RED), red_pairs, tmp_path)
    tokenizer, actors = trainer.processing_class, trainer.actors
    with torch.no_grad():
        for name, parameter in actors.trained().items():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    prompts = [prompt("thing1", tokenizer), prompt("thing2 thing3 thing4", tokenizer)]
    answers = answers_of(tokenizer, "red blue green<end>", "white")
    rollouts = as_rollouts(prompts, answers, tokenizer, 0, "cpu")
    rows = torch.arange(2)
    assert actors.unshared is None
    with torch.no_grad():
        policy, _ = read_policy(actors, rollouts, rows, 0.7)
        reference = read_reference(actors, rollouts, rows, 0.7)
        base = actors.policy.get_base_model()
        for i, (asked, answer) in enumerate(zip(prompts, answers, strict=True)):
            ours = policy.log_probs[i][rollouts.mask[i]].tolist()
            theirs = reference[i][rollouts.mask[i]].tolist()
            expected = log_probs_one_by_one(base, asked.ids, answer, 0.7)
            assert ours == pytest.approx(expected, abs=1e-4)
            with actors.policy.disable_adapter():
                expected = log_probs_one_by_one(base, asked.ids, answer, 0.7)
            assert theirs == pytest.approx(expected, abs=1e-4)
            assert ours != pytest.approx(theirs, abs=1e-2)
        logits = base(input_ids=torch.tensor([prompts[0].ids])).logits[0, -1] / 0.7
        p = logits.softmax(-1)
        assert policy.entropy is not None
        assert float(policy.entropy[0, 0]) == pytest.approx(float(-(p * p.log()).sum()), abs=1e-4)


def test_the_critic_reads_the_state_before_each_token(
    model: str, red_pairs: Path, tmp_path: Path
) -> None:
    import torch

    from training.actors import read_policy

    trainer = trainer_for(ppo(model).given(RED), red_pairs, tmp_path)
    tokenizer, actors = trainer.processing_class, trainer.actors
    torch.nn.init.normal_(actors.value_head.weight)
    prompts = [prompt("thing1", tokenizer)] * 2
    # Alike up to the last token: so are all values, for none has seen what comes after it.
    answers = answers_of(tokenizer, "red blue<end>", "red blue black")
    rollouts = as_rollouts(prompts, answers, tokenizer, 0, "cpu")
    with torch.no_grad():
        _, values = read_policy(actors, rollouts, torch.arange(2), 1.0)
    assert torch.allclose(values[0], values[1], atol=1e-5)
    assert float(values[0].std()) > 0.01


@pytest.fixture(scope="module")
def reward_run(
    tmp_path_factory: pytest.TempPathFactory, model: str, red_pairs: Path
) -> tuple[RewardConfig, Path]:
    """A reward model of red, an adapter on the tiny model."""
    config = RewardConfig(
        model=model,
        learning_rate=5e-3,
        batch_size=8,
        max_steps=12,
        max_length=48,
        dtype="float32",
        gradient_checkpointing=False,
    )
    run = tmp_path_factory.mktemp("reward") / "run"
    train_any(config, red_pairs, run, progress=silent)
    return config, run


def test_the_reward_model_on_the_shared_base_scores_as_its_published_model(
    model: str, red_pairs: Path, reward_run: tuple[RewardConfig, Path], tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    from training import reward_head
    from training.actors import read_reward

    reward_config, run = reward_run
    config = ppo(model, reward_functions={}, reward_model=str(run))
    trainer = trainer_for(config, red_pairs, tmp_path)
    actors, tokenizer = trainer.actors, trainer.processing_class
    assert actors.frozen is actors.policy  # one base
    prompts = [prompt("thing1", tokenizer), prompt("thing2 thing3", tokenizer)]
    answers = answers_of(tokenizer, "red red<end>", "white black blue<end>")
    rollouts = as_rollouts(prompts, answers, tokenizer, 0, "cpu")
    before = set(actors.trained())
    found = read_reward(actors, rollouts, torch.arange(2)).tolist()
    alone = AutoModelForSequenceClassification.from_pretrained(
        publish_reward_model(reward_config, run)
    ).eval()
    reward_head.read_at_ends(alone, packing=False)
    rows = [list(p.ids + a.ids) for p, a in zip(prompts, answers, strict=True)]
    assert found == pytest.approx(reward_head.rewards(alone, rows, 2), abs=1e-4)
    assert found[0] != pytest.approx(found[1], abs=1e-2)
    # Asking it left the policy as it was, and what trains.
    assert set(actors.trained()) == before
    assert not any(".reward." in name for name in before)
    assert actors.policy.active_adapter == "default"


def test_a_reward_model_is_normalised_on_the_reference_and_the_critic_starts_as_it(
    model: str, red_pairs: Path, reward_run: tuple[RewardConfig, Path], tmp_path: Path
) -> None:
    import torch

    config = ppo(
        model,
        reward_functions={},
        reward_model=str(reward_run[1]),
        reward_samples=48,
        learning_rate=1e-9,
        rollouts=48,
        batch_size=48,
    )
    trainer = trainer_for(config, red_pairs, tmp_path)
    trainer._normalise()
    # The very answers it was normalised on have mean 0 and deviation 1.
    asked = [trainer.prompts[i] for i in prompts_of_step(24, 48, config.seed, 1)]
    answers = trainer._sample(asked, seed_of_step(config.seed, 0))
    scores, _ = trainer._score(trainer._rollouts(asked, answers))
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4)
    assert float(scores.std()) == pytest.approx(1, abs=1e-4)
    # Raw s becomes (s − shift)/scale, and so does the head w·h.
    head = trainer.actors.reward_head
    hidden = torch.randn(5, head.in_features)
    raw = head(hidden)
    expected = (raw - trainer.shift) / trainer.scale
    assert torch.allclose(trainer.actors.value_head(hidden), expected, atol=1e-5)


def test_a_run_on_a_reward_model_saves_the_policy_alone_and_resumes_exactly(
    model: str, red_pairs: Path, reward_run: tuple[RewardConfig, Path], tmp_path: Path
) -> None:
    config = ppo(model, reward_functions={}, reward_model=str(reward_run[1]), max_steps=3)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    expected = train(config, red_pairs, whole, EACH, progress=silent)

    class Stop(Exception):
        pass

    def stop(step: int, *_: Any) -> None:
        if step == 2:
            raise Stop

    with pytest.raises(Stop):
        train(config, red_pairs, resumed, EACH, progress=stop)
    result = train(config, red_pairs, resumed, EACH, progress=silent)
    assert equal(saved_weights(resumed, result), saved_weights(whole, expected))
    assert (resumed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert [path.name for path in (whole / "adapter").iterdir() if path.is_dir()] == []
    assert not any("reward" in name for name in saved_weights(whole, expected))


def test_a_run_does_not_go_on_with_another_reward_model(
    model: str, red_pairs: Path, reward_run: tuple[RewardConfig, Path], tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    run = tmp_path / "reward"
    shutil.copytree(reward_run[1], run)
    config = ppo(model, reward_functions={}, reward_model=str(run))

    class Stop(Exception):
        pass

    def stop(step: int, *_: Any) -> None:
        if step == 2:
            raise Stop

    with pytest.raises(Stop):
        train(config, red_pairs, tmp_path / "run", EACH, progress=stop)
    file = run / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(InputError, match="is not what this run began with"):
        train(config, red_pairs, tmp_path / "run", EACH, progress=silent)


@pytest.mark.parametrize(
    "weights",
    [
        "full",
        "lora",
        "dora",
        "qlora",
        "ia3",
        "bottleneck",
        "ln_tuning",
        "prefix_tuning",
        "prompt_tuning",
    ],
)
def test_every_kind_of_weights_starts_at_its_reference_and_moves_away(
    weights: str, model: str, red_pairs: Path, tmp_path: Path
) -> None:
    config = ppo(model, weights=weights)
    train(config, red_pairs, tmp_path / "run", EACH, progress=silent, functions=RED)
    first, second = [line for line in RunFolder(tmp_path / "run").metrics() if "kl" in line]
    if not weights.endswith("tuning") or weights == "ln_tuning":  # virtual tokens draw attention
        assert first["kl"] == pytest.approx(0, abs=1e-4)
    assert abs(second["kl"]) > 1e-4


def test_people_are_told_how_answers_are_read(model: str, red_pairs: Path, tmp_path: Path) -> None:
    said = {}
    for weights in ("full", "prompt_tuning"):
        config = ppo(model, weights=weights).given(RED)
        said[weights] = trainer_for(config, red_pairs, tmp_path).forward_pass
    assert said["full"] == "shared: each prompt once, no padding, answers' tokens scored"
    assert said["prompt_tuning"] == (
        "with padding and repeated prompts: virtual tokens stand before every row"
    )


def test_on_a_base_in_4_bits_there_is_one_base_and_it_is_in_4_bits(
    model: str, red_pairs: Path, tmp_path: Path
) -> None:
    from bitsandbytes.nn.modules import Linear4bit

    trainer = trainer_for(ppo(model, weights="qlora").given(RED), red_pairs, tmp_path)
    actors = trainer.actors
    assert actors.frozen is actors.policy
    # Seven linear layers in each of two blocks.
    assert sum(isinstance(module, Linear4bit) for module in actors.policy.modules()) == 14
    assert all("lora" in n or n.startswith("value_head") for n in actors.trained())


def test_a_reward_model_of_another_base_is_refused(
    model: str, red_pairs: Path, reward_run: tuple[RewardConfig, Path], tmp_path: Path
) -> None:
    config = ppo(model, weights="qlora", reward_functions={}, reward_model=str(reward_run[1]))
    with pytest.raises(InputError, match="take both in 4 bits or neither"):
        trainer_for(config, red_pairs, tmp_path)


def test_full_weights_keep_a_copy_for_reference_and_reward(
    model: str, red_pairs: Path, reward_run: tuple[RewardConfig, Path], tmp_path: Path
) -> None:
    config = ppo(
        model,
        weights="full",
        reward_functions={},
        reward_model=str(reward_run[1]),
        learning_rate=1e-3,
    )
    train(config, red_pairs, tmp_path / "run", EACH, progress=silent)
    first, second = [line for line in RunFolder(tmp_path / "run").metrics() if "kl" in line]
    assert first["kl"] == pytest.approx(0, abs=1e-4)
    assert second["kl"] != pytest.approx(0, abs=1e-4)
    # Normalised, the reference's answers are worth about 0: within 4/√16.
    assert abs(first["score"]) < 1


def test_activations_computed_again_give_the_same_updates(
    model: str, red_pairs: Path, tmp_path: Path
) -> None:
    import torch

    weights = []
    for again in (False, True):
        config = ppo(model, gradient_checkpointing=again)
        run = tmp_path / str(again)
        result = train(config, red_pairs, run, progress=silent, functions=RED)
        weights.append(saved_weights(run, result))
    assert all(torch.allclose(weights[0][n], weights[1][n], atol=1e-5) for n in weights[0])


def test_experience_keeps_padding_out(model: str, red_pairs: Path, tmp_path: Path) -> None:
    import torch

    from training.ppo_step import gather_experience

    config = ppo(model, batch_size=1, rollouts=1).given(RED)
    trainer = trainer_for(config, red_pairs, tmp_path)
    tokenizer = trainer.processing_class
    torch.nn.init.normal_(trainer.actors.value_head.weight)
    prompts = [prompt("thing1", tokenizer), prompt("thing2 thing3", tokenizer)]
    answers = answers_of(tokenizer, "red<end>", "white black blue green<end>")
    together = as_rollouts(prompts, answers, tokenizer, 0, "cpu")
    scores = torch.tensor([1.0, 2.0])
    both, _ = gather_experience(config, trainer.actors, together, scores, 0.05)
    for i in range(2):
        single = as_rollouts(prompts[i : i + 1], answers[i : i + 1], tokenizer, 0, "cpu")
        alone, _ = gather_experience(config, trainer.actors, single, scores[i : i + 1], 0.05)
        ours, theirs = both.returns[i][together.mask[i]], alone.returns[0][single.mask[0]]
        assert torch.allclose(ours, theirs, atol=1e-5)
