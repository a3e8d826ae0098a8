"""A reward model is trained by the loss it should be, read where it should be, packed without
harm, resumed exactly, and published so that others read the same rewards."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from judging.judge import Group
from judging.reward_model import RewardModelJudge, open_reward_model
from preferences.conversations import make_prompt
from preferences.errors import InputError
from preferences.records import Candidate, Message
from tests.training.conftest import (
    assert_an_interruption_changes_nothing,
    build_tokenizer,
    saved_weights,
    silent,
    write_split,
)
from training.loop import train
from training.reward import (
    RewardConfig,
    build_trainer,
    held_out_accuracy,
    load_data,
    publish_reward_model,
    reward_evaluation,
)
from training.run import TrainingRuntime

Floats = NDArray[np.float64]
MakeConfig = Callable[..., RewardConfig]

RESPONSES = ("red red", "blue green", "red blue black", "white", "red red red red")


@pytest.fixture
def reward_config(model: str) -> MakeConfig:
    """A configuration for the tiny model; keyword arguments change fields."""
    defaults: dict[str, Any] = {
        "model": model,
        "learning_rate": 3e-3,
        "batch_size": 4,
        "max_steps": 12,
        "max_length": 48,
        "dtype": "float32",
        "gradient_checkpointing": False,
        "eval_steps": 6,
        "schedule": "constant",
        "warmup_share": 0,
    }
    return lambda **changes: RewardConfig(**{**defaults, **changes})


def trainer_for(config: RewardConfig, dataset: Path, output: Path) -> Any:
    pairs, _ = load_data(config, dataset, tokenizer_of(config))
    assert pairs is not None
    return build_trainer(config, TrainingRuntime(), output, pairs, None)


def tokenizer_of(config: RewardConfig) -> Any:
    from training.models import load_tokenizer

    return load_tokenizer(config.model, None)


def conversation(response: str) -> list[dict[str, str]]:
    asked = {"role": "user", "content": "paint thing30"}
    return [asked, {"role": "assistant", "content": response}]


def softplus(x: Floats) -> Floats:
    found: Floats = np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))
    return found


def numpy_loss(
    chosen: Floats, rejected: Floats, p: Floats, weight: Floats, margin: Floats, centring: float
) -> float:
    z = chosen - rejected - margin
    each = p * softplus(-z) + (1 - p) * softplus(z)
    return float(np.mean(weight * each) + centring * np.mean((chosen + rejected) ** 2))


def test_the_loss_and_its_gradient_are_those_of_an_independent_implementation() -> None:
    import torch

    from training.reward_trainer import bradley_terry_loss

    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(0, 3, 7), rng.normal(0, 3, 7)
    p, weight, margin = rng.uniform(0, 1, 7), rng.uniform(0.2, 2, 7), rng.uniform(0, 2, 7)
    p[:2] = 1.0
    given = [torch.tensor(a, requires_grad=True) for a in (chosen, rejected)]
    labels = [torch.tensor(a) for a in (p, weight, margin)]
    loss = bradley_terry_loss(given[0], given[1], labels[0], labels[1], labels[2], 0.03)
    loss.backward()  # type: ignore[no-untyped-call]
    expected = numpy_loss(chosen, rejected, p, weight, margin, 0.03)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-12)
    # d/dr_c = [weight·(σ(z) − p) + 2λ·(r_c + r_r)]/n; in d/dr_r the first part's sign is turned.
    z = chosen - rejected - margin
    pull = weight * (1 / (1 + np.exp(-z)) - p)
    towards_zero = 2 * 0.03 * (chosen + rejected)
    assert given[0].grad is not None
    assert given[1].grad is not None
    assert np.allclose(given[0].grad.numpy(), (pull + towards_zero) / 7, rtol=1e-12)
    assert np.allclose(given[1].grad.numpy(), (-pull + towards_zero) / 7, rtol=1e-12)


def test_a_certain_pair_of_equal_rewards_costs_ln_2_and_a_margin_costs_more() -> None:
    import torch

    from training.reward_trainer import bradley_terry_loss

    zero, one = torch.zeros(1), torch.ones(1)
    assert float(bradley_terry_loss(zero, zero, one, one, zero, 0)) == pytest.approx(math.log(2))
    # log(1 + e^1) = 1.313262 for a margin of 1; centring adds 0.1·(1 + 1)² = 0.4 where both are 1.
    assert float(bradley_terry_loss(zero, zero, one, one, one, 0)) == pytest.approx(1.313262)
    assert float(bradley_terry_loss(one, one, one, one, one, 0.1)) == pytest.approx(1.713262)


def test_the_head_starts_with_variance_one_over_hidden_units_plus_one(model: str) -> None:
    import torch

    from training import reward_head

    heads = [
        reward_head.load(model, None, "lora", "bfloat16", seed).score.weight for seed in range(12)
    ]
    assert all(head.dtype == torch.float32 for head in heads)
    assert not torch.equal(heads[0], heads[1])
    assert torch.equal(heads[0], reward_head.load(model, None, "full", "float32", 0).score.weight)
    # 12·32 draws: the variance's own deviation is √(2/384) = 7 % of it.
    variance = float(torch.cat(heads).var())
    assert variance == pytest.approx(1 / 33, rel=0.25)


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_the_loss_of_a_batch_is_that_of_its_rewards_read_one_by_one(
    labels: str, reward_config: MakeConfig, tmp_path: Path
) -> None:
    dataset = dataset_with(tmp_path, probabilities=(0.6, 0.9, 0.75), margins=(0.5, 2.0, 1.0))
    config = reward_config(labels=labels, margin=0.5, centring=0.1, balance="prompts")
    trainer = trainer_for(config, dataset, tmp_path / "run")
    policy = trainer.model.eval()
    rewards = [alone(policy, trainer.processing_class, *turns) for turns in three_pairs()]
    chosen, rejected = (np.array([pair[i] for pair in rewards]) for i in (0, 1))
    p = np.array([0.6, 0.9, 0.75] if labels == "soft" else [1.0] * 3)
    # Two prompts, of which the second has two pairs: 3/2, 3/4 and 3/4.
    weight, margin = np.array([1.5, 0.75, 0.75]), np.array([0.25, 1.0, 0.5])
    expected = numpy_loss(chosen, rejected, p, weight, margin, 0.1)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    assert float(trainer.compute_loss(policy, batch).detach()) == pytest.approx(expected, abs=1e-5)


def three_pairs() -> list[tuple[str, str, str]]:
    return [
        ("paint thing0", "red red", "blue"),
        ("paint thing1", "red", "blue green white"),
        ("paint thing1", "red red", "black"),
    ]


def dataset_with(
    folder: Path,
    probabilities: tuple[float, ...] = (0.9, 0.9, 0.9),
    margins: tuple[float | None, ...] = (2.0, 2.0, 2.0),
) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_split(folder / "d", "train", three_pairs())
    path = folder / "d" / "data" / "train-00000.parquet"
    table = pq.read_table(path).drop_columns(["probability", "margin"])
    table = table.append_column("probability", pa.array(probabilities))
    pq.write_table(table.append_column("margin", pa.array(margins, pa.float64())), path)
    return folder / "d"


def alone(model: Any, tokenizer: Any, prompt: str, *answers: str) -> list[float]:
    """The head on the trunk's state at the end token of each answer, with nothing of ours."""
    import torch

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    rewards = []
    for answer in answers:
        text = f"<bos><user>{prompt}<end>\n<assistant>{answer}<end>"
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            rewards.append(float(base.score(base.model(input_ids=ids).last_hidden_state)[0, -1, 0]))
    return rewards


def test_margins_stay_with_their_pairs_when_others_are_dropped(
    reward_config: MakeConfig, tmp_path: Path
) -> None:
    dataset = dataset_with(tmp_path, margins=(0.5, 2.0, 1.0))
    config = reward_config(margin=1.0, max_length=10)
    pairs, _ = load_data(config, dataset, tokenizer_of(config))
    assert pairs is not None
    # The second pair's rejected answer is the longest: 7 tokens before it, and 4 of its own.
    assert pairs.counts.dropped == {"answer_too_long": 1}
    assert pairs.rows["margin"][:] == [0.5, 1.0]


def test_a_dataset_without_margins_is_refused_only_where_margins_count(
    reward_config: MakeConfig, tmp_path: Path
) -> None:
    dataset = dataset_with(tmp_path, margins=(0.5, None, 1.0))
    tokenizer = tokenizer_of(reward_config())
    load_data(reward_config(), dataset, tokenizer)
    with pytest.raises(InputError, match=r"pair c1>r1: its margin is None; mend .*margin: 0"):
        load_data(reward_config(margin=1.0), dataset, tokenizer)


def small_gpt2(folder: Path) -> str:
    """A model whose positions are learnt numbers and not angles."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = build_tokenizer()
    torch.manual_seed(4)
    shape = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2LMHeadModel(shape).save_pretrained(folder)  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packed_answers_get_the_rewards_and_the_gradients_of_answers_alone(
    kind: str, attention: str, model: str, tmp_path: Path
) -> None:
    import torch

    from training import reward_head

    folder = model if kind == "llama" else small_gpt2(tmp_path)
    sequences = [[2, 4, 7 + i, *range(8, 8 + length), 3] for i, length in enumerate((1, 9, 3, 3))]
    found = []
    for packing in (False, True):
        loaded = reward_head.load(folder, None, "full", "float32", 0).eval()
        loaded.set_attn_implementation(attention)
        reward_head.read_at_ends(loaded, packing)
        widths = (None, 20, 0) if packing else (-1,)
        for width in widths:
            laid_out = (
                reward_head.packed(sequences, width)
                if packing
                else reward_head.one_a_row(sequences)
            )
            rewards = loaded(**laid_out.tensors()).logits[:, 0]
            loaded.zero_grad()
            (rewards * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum().backward()
            gradients = [p.grad.flatten() for p in loaded.parameters() if p.grad is not None]
            found.append((laid_out.input_ids.shape[0], rewards.detach(), torch.cat(gradients)))
    (rows, rewards, gradient), *packed = found
    # Lengths 5, 13, 7 and 7: one row of 32; of 20 tokens at most, 13 + 7 and 7 + 5; of 13 at most,
    # 13 and 7 + 5 and 7.
    assert [rows, *(one[0] for one in packed)] == [4, 1, 2, 3]
    assert float((rewards[2] - rewards[3]).abs()) > 1e-3
    for _, theirs, their_gradient in packed:
        assert torch.allclose(theirs, rewards, rtol=0, atol=1e-6)
        assert torch.allclose(their_gradient, gradient, rtol=0, atol=1e-5)


def test_what_the_published_tokenizer_renders_ends_with_the_end_token() -> None:
    from training.reward_head import make_closed

    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    asked = tokenizer.apply_chat_template(
        conversation("red")[:1], add_generation_prompt=True, return_dict=True
    )
    before = tokenizer.apply_chat_template(conversation("red"), return_dict=True)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(before[-2:]) == ["<end>", "\n"]
    make_closed(tokenizer, {tokenizer.eos_token_id})
    make_closed(tokenizer, {tokenizer.eos_token_id})
    after = tokenizer.apply_chat_template(conversation("red"), return_dict=True)["input_ids"]
    assert after == before[:-1]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    # What a generating model is asked with is as it was.
    again = tokenizer.apply_chat_template(
        conversation("red")[:1], add_generation_prompt=True, return_dict=True
    )
    assert again["input_ids"] == asked["input_ids"]


@pytest.mark.parametrize("weights", ["lora", "qlora", "full"])
@pytest.mark.parametrize("pad_is_end", [False, True])
def test_the_published_model_is_read_alike_by_transformers_the_judge_and_us(
    weights: str, pad_is_end: bool, reward_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    import shutil

    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    config = reward_config(weights=weights, max_steps=6)
    if pad_is_end:
        shutil.copytree(config.model, tmp_path / "padless")
        tokenizer = AutoTokenizer.from_pretrained(config.model)
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(tmp_path / "padless")
        config = reward_config(weights=weights, max_steps=6, model=str(tmp_path / "padless"))
    result = train(config, red_pairs, tmp_path / "run", progress=silent)
    folder = publish_reward_model(config, tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    published = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert published.config.num_labels == 1
    assert published.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    by_hand = alone(published, tokenizer, "paint thing30", *RESPONSES)
    # In one batch, which transformers pads and reads by the padding token.
    batch: Any = tokenizer.apply_chat_template(
        [conversation(response) for response in RESPONSES],
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        together = published(**batch).logits[:, 0].tolist()
    assert together == pytest.approx(by_hand, abs=1e-5)
    judge = RewardModelJudge(kind="reward_model", name="ours", model=str(folder))
    with open_reward_model(judge) as score:
        judged = score([turns(response) for response in RESPONSES])
    assert judged == pytest.approx(by_hand, abs=1e-5)
    # And it is what was trained: merging changes nothing but the last digits.
    accuracy = held_out_accuracy(config, tmp_path / "run", red_pairs)
    assert accuracy.accuracy.mean == pytest.approx(
        result.evaluation["eval_rewards/accuracies"], abs=1e-9
    )
    trained = loaded_as_trained(config, tmp_path / "run")
    assert by_hand == pytest.approx(
        alone(trained, tokenizer, "paint thing30", *RESPONSES), abs=2e-5
    )


def turns(response: str) -> tuple[Message, ...]:
    return tuple(Message(turn["role"], turn["content"]) for turn in conversation(response))


def loaded_as_trained(config: RewardConfig, run: Path) -> Any:
    """The base as it was trained on, with the saved adapter and head on it, not merged."""
    import peft

    from training import reward_head

    if config.weights == "full":
        return reward_head.load(str(run / "model"), None, "full", config.dtype, 0).eval()
    base = reward_head.load(config.model, None, config.weights, config.dtype, 7)
    return peft.PeftModel.from_pretrained(base, str(run / "adapter")).eval()


def test_a_model_trained_on_red_is_a_judge_who_likes_red(
    reward_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    from judging.reward_model import reward_model
    from preferences.journal import Journal
    from preferences.store import Shard, Store

    config = reward_config(max_steps=40)
    train(config, red_pairs, tmp_path / "run", progress=silent)
    found = held_out_accuracy(config, tmp_path / "run", red_pairs)
    assert found.pairs == 24
    assert found.accuracy.mean > 0.9
    assert found.accuracy.low > 0.6
    assert found.nll < 0.4  # a coin's is 0.693
    assert found.bayes == 1.0  # hard labels leave nothing open
    folder = publish_reward_model(config, tmp_path / "run")
    judge = RewardModelJudge(kind="reward_model", name="ours", model=str(folder))
    prompt = make_prompt((Message("user", "paint thing40"),), "test")
    candidates = tuple(
        Candidate(f"c{i}", prompt.prompt_id, "m", text, "complete")
        for i, text in enumerate(("red red", "blue red green", "black white blue"))
    )
    journal = Journal(Store(tmp_path / "store"), "ours", Shard(0, 1))
    with open_reward_model(judge) as score, journal:
        asks = reward_model(judge, "identity", score, journal)
        scores = [judgment.scores for judgment in asks([Group(prompt, candidates)])]
    assert all(one is not None for one in scores)
    assert scores[0] == max(one for one in scores if one is not None)


@pytest.mark.parametrize(
    "weights", ["lora", pytest.param("dora", marks=pytest.mark.slow), "qlora", "full"]
)
def test_sixteen_bits_and_checkpointed_activations_train_the_head_and_the_body(
    weights: str, reward_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    import torch

    config = reward_config(
        weights=weights, dtype="bfloat16", gradient_checkpointing=True, max_steps=20
    )
    trainer = trainer_for(config, red_pairs, tmp_path / "start")
    trains = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trains.values()} == {torch.float32}
    before = {name: parameter.detach().clone() for name, parameter in trains.items()}
    trainer.train()
    moved = [name for name in trains if not torch.equal(before[name], trains[name])]
    assert any("score" in name for name in moved)
    assert len(moved) > 0.9 * len(trains)
    # Published in 16 bits, rewards keep two digits; they are a few units apart.
    train(config, red_pairs, tmp_path / "run", progress=silent)
    folder = publish_reward_model(config, tmp_path / "run")
    judge = RewardModelJudge(kind="reward_model", name="ours", model=str(folder))
    with open_reward_model(judge) as score:
        judged = score([turns(response) for response in RESPONSES])
    trained = loaded_as_trained(config, tmp_path / "run").float()
    expected = alone(trained, tokenizer_of(config), "paint thing30", *RESPONSES)
    assert judged == pytest.approx(expected, abs=0.05)
    assert max(expected) - min(expected) > 1
    assert judged[0] > judged[2]  # red red, and red blue black


RESUMABLE: dict[str, Any] = {
    "lora": {"rank": 4, "dropout": 0.2},
    "batch_size": 2,
    "accumulation": 2,
    "learning_rate": 2e-3,
}


@pytest.mark.parametrize("weights", ["lora", "qlora", "full"])
def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(
    weights: str, reward_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    config = reward_config(**RESUMABLE, weights=weights)
    assert_an_interruption_changes_nothing(config, red_pairs, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "broken" / "metrics.jsonl").open()]
    assert {"rewards/accuracies", "rewards/margins", "mean_reward"} <= lines[0].keys()


def test_packing_changes_no_weight_beyond_rounding(
    reward_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    import torch

    saved = []
    for packing in (True, False):
        config = reward_config(packing=packing)
        run = tmp_path / str(packing)
        saved.append(saved_weights(run, train(config, red_pairs, run, progress=silent)))
    assert all(torch.allclose(saved[0][k], saved[1][k], rtol=0, atol=2e-4) for k in saved[0])


def test_the_adapter_and_the_head_serve_beside_a_policy_on_one_base(
    reward_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    import peft
    import torch

    from training import adapters, models, reward_head

    config = reward_config(weights="lora")
    train(config, red_pairs, tmp_path / "run", progress=silent)
    expected = alone(
        loaded_as_trained(config, tmp_path / "run"),
        tokenizer_of(config),
        "paint thing30",
        *RESPONSES,
    )
    base = models.load_model(config.model, None, "lora", "float32")
    policy = peft.get_peft_model(base, adapters.adapter_config(base, config))
    before = {name for name, p in policy.named_parameters() if p.requires_grad}
    head = reward_head.add_adapter(policy, tmp_path / "run" / "adapter", "reward")
    assert policy.active_adapter == "default"
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == before
    policy.set_adapter("reward")
    tokenizer = tokenizer_of(config)
    for response, reward in zip(RESPONSES, expected, strict=True):
        text = f"<bos><user>paint thing30<end>\n<assistant>{response}<end>"
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            state = base.model(input_ids=ids).last_hidden_state[0, -1]
            assert float(head(state)) == pytest.approx(reward, abs=1e-5)


@pytest.mark.parametrize("weights", ["bitfit", "prefix_tuning", "bottleneck"])
def test_weights_that_cannot_carry_a_head_are_refused(
    weights: str, reward_config: MakeConfig
) -> None:
    with pytest.raises(ValueError, match=f"{weights} cannot carry a reward head; say one of full"):
        reward_config(weights=weights)


def test_a_reward_models_worth_is_counted_as_it_says() -> None:
    # Gaps 2, -1 and 0 with labels of .9, .6 and 1, of two prompts.
    found = reward_evaluation(
        [3.0, 1.0, 0.0, 1.0, 2.0, 2.0], [0.9, 0.6, 1.0], ["p", "p", "q"], [2, 1, 2, 1, 1, 1]
    )
    # .9 for the first, 1 - .6 for the second, half for the tie.
    assert found.accuracy.mean == pytest.approx((0.9 + 0.4 + 0.5) / 3)
    assert found.bayes == pytest.approx((0.9 + 0.6 + 1.0) / 3)
    assert found.longer_wins.mean == pytest.approx((0.9 + 0.6 + 0.5) / 3)
    # log(1 + e^-2) = .126928 and log(1 + e^2) = 2.126928; .313262 and 1.313262; .693147.
    first = 0.9 * 0.126928 + 0.1 * 2.126928
    second = 0.6 * 1.313262 + 0.4 * 0.313262
    assert found.nll == pytest.approx((first + second + 0.693147) / 3, abs=1e-6)
    # σ(2) = .880797 (bin 8 of 10 from 1/2), σ(1) = .731059 (bin 5), 1/2 (bin 1).
    assert [b.pairs for b in found.bins] == [1, 1, 1]
    assert [b.predicted for b in found.bins] == pytest.approx([0.5, 0.731059, 0.880797], abs=1e-6)
    assert [b.seen for b in found.bins] == pytest.approx([0.5, 0.4, 0.9])
    assert found.ece == pytest.approx((0 + 0.331059 + 0.019203) / 3, abs=1e-6)
    # Rewards 3, 1, 0, 1, 2, 2: mean 1.5, squares 2.25 + .25 + 2.25 + .25 + .25 + .25 = 5.5.
    assert found.mean_reward == pytest.approx(1.5)
    assert found.reward_deviation == pytest.approx(math.sqrt(5.5 / 6))
