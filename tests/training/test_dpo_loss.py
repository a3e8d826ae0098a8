"""The loss that is trained is the one of the paper, on the tokens it should be on."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from preferences.errors import InputError
from tests.training.conftest import equal, saved_weights, silent, write_split
from training.dpo import DPOConfig, build_trainer, load_data
from training.loop import train
from training.models import load_tokenizer
from training.run import TrainingRuntime

MakeConfig = Callable[..., DPOConfig]


def trainer_for(config: DPOConfig, dataset: Path, output: Path) -> Any:
    pairs, _ = load_data(config, dataset, load_tokenizer(config.model, None))
    assert pairs is not None
    return build_trainer(config, TrainingRuntime(), output, pairs, None)


def trained_loss(trainer: Any, rows: list[dict[str, Any]]) -> float:
    """The loss of a batch, through TRL's collator and TRL's loss."""
    trainer.model.eval()
    return float(trainer.compute_loss(trainer.model, trainer.data_collator(rows)).detach())


@pytest.mark.parametrize("weights", ["lora", "qlora", "full"])
def test_before_any_step_the_loss_of_every_pair_is_ln_2(
    weights: str, make_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    trainer = trainer_for(make_config(weights=weights), red_pairs, tmp_path)
    rows = [trainer.train_dataset[i] for i in range(6)]
    # Policy and reference agree, so Δ = 0 and −log σ(0) = ln 2.
    assert trained_loss(trainer, rows) == pytest.approx(math.log(2), abs=1e-5)


def test_an_adapter_that_has_not_trained_changes_nothing(
    make_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    import torch

    policy = trainer_for(make_config(), red_pairs, tmp_path).model.eval()
    ids = torch.tensor([[2, 4, 8, 15, 3]])
    with torch.no_grad():
        adapted = policy(input_ids=ids).logits
        with policy.disable_adapter():
            base = policy(input_ids=ids).logits
    assert torch.equal(adapted, base)


def summed_log_prob(model: Any, text: str, answer: str, tokenizer: Any) -> float:
    """log π(answer + <end> | text), token by token, with nothing of ours or of TRL's."""
    import torch

    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    answered = tokenizer(answer + "<end>", add_special_tokens=False)["input_ids"]
    total = 0.0
    for i, token in enumerate(answered):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answered[:i]])).logits[0, -1]
        total += float(logits[token] - torch.logsumexp(logits, 0))
    return total


def test_the_loss_of_each_pair_is_equation_7_of_the_paper(
    make_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    import pyarrow.parquet as pq
    import torch
    from transformers import AutoModelForCausalLM

    config = make_config(beta=0.3)
    trainer = trainer_for(config, red_pairs, tmp_path)
    torch.manual_seed(3)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # zero at the start; now the policy is another model
            torch.nn.init.normal_(parameter, std=0.2)
    reference = AutoModelForCausalLM.from_pretrained(config.model).eval()
    tokenizer = load_tokenizer(config.model, None)
    table = pq.read_table(red_pairs / "data" / "train-00000.parquet").to_pylist()
    expected = []
    for i in range(5):
        row = table[i]
        text = f"<bos><user>{row['prompt'][0]['content']}<end>\n<assistant>"
        gains = []
        for answer in (row["chosen"][0]["content"], row["rejected"][0]["content"]):
            policy = summed_log_prob(trainer.model.eval(), text, answer, tokenizer)
            gains.append(policy - summed_log_prob(reference, text, answer, tokenizer))
        expected.append(math.log1p(math.exp(-config.beta * (gains[0] - gains[1]))))
        assert trained_loss(trainer, [trainer.train_dataset[i]]) == pytest.approx(
            expected[-1], abs=2e-5
        )
    assert max(expected) - min(expected) > 0.01  # the pairs do differ
    # A batch's loss is the mean of its pairs', whatever padding they need beside each other.
    batch = [trainer.train_dataset[i] for i in range(5)]
    assert trained_loss(trainer, batch) == pytest.approx(sum(expected) / 5, abs=2e-5)


def test_a_soft_label_weighs_both_outcomes_by_its_probability() -> None:
    import torch

    from training.labels import label_losses, labelled_loss

    z = torch.tensor([0.0, 2.0, -1.0], requires_grad=True)
    probability, weight = torch.tensor([0.5, 0.9, 0.6]), torch.tensor([1.0, 2.0, 0.5])
    losses = label_losses("sigmoid", z, beta=1.0, margin=torch.zeros(3))
    loss = labelled_loss(*losses, probability, weight)
    # -log σ(0) = .693147, -log σ(2) = .126928 and -log σ(-2) = 2.126928,
    # -log σ(-1) = 1.313262 and -log σ(1) = .313262:
    # .693147; 2·(.9·.126928 + .1·2.126928) = .653856; .5·(.6·1.313262 + .4·.313262) = .456631.
    assert float(loss.detach()) == pytest.approx((0.693147 + 0.653856 + 0.456631) / 3, abs=1e-6)
    loss.backward()  # type: ignore[no-untyped-call]
    # The derivative by z is weight·(σ(z) - p) / 3, with σ(2) = .880797 and σ(-1) = .268941.
    assert z.grad is not None
    assert z.grad.tolist() == pytest.approx(
        [0.0, 2 * (0.880797 - 0.9) / 3, 0.5 * (0.268941 - 0.6) / 3], abs=1e-6
    )


def moved_away(trainer: Any, full: bool) -> None:
    """Make the policy another model than its reference."""
    import torch

    torch.manual_seed(3)
    for name, parameter in trainer.model.named_parameters():
        if full:
            parameter.data += 0.05 * torch.randn_like(parameter)
        elif "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)


def pairs_with(folder: Path, probabilities: list[float | None]) -> Path:
    """A pair of each probability, the last two of one prompt."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    last = len(probabilities) - 1
    write_split(
        folder,
        "train",
        [(f"paint thing{min(n, last - 1)}", "red red", "blue " * (n + 1)) for n in range(last + 1)],
    )
    path = folder / "data" / "train-00000.parquet"
    table = pq.read_table(path).drop_columns(["probability"])
    pq.write_table(table.append_column("probability", pa.array(probabilities, pa.float64())), path)
    return folder


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_each_pair_is_trained_by_its_own_probability_and_its_prompts_weight(
    weights: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    probabilities: list[float | None] = [0.55, 0.7, 0.95]
    dataset = pairs_with(tmp_path / "d", probabilities)
    config = make_config(beta=0.3, labels="soft", balance="prompts", weights=weights)
    trainer = trainer_for(config, dataset, tmp_path / "run")
    moved_away(trainer, full=weights == "full")
    reference = AutoModelForCausalLM.from_pretrained(config.model).eval()
    tokenizer = load_tokenizer(config.model, None)
    expected = []
    # Three pairs of two prompts: the first prompt's counts 3/2, the second's two 3/4 each.
    for n, (p, weight) in enumerate(zip((0.55, 0.7, 0.95), (1.5, 0.75, 0.75), strict=True)):
        text = f"<bos><user>paint thing{min(n, 1)}<end>\n<assistant>"
        gains = []
        for answer in ("red red", " ".join(["blue"] * (n + 1))):
            policy = summed_log_prob(trainer.model.eval(), text, answer, tokenizer)
            gains.append(policy - summed_log_prob(reference, text, answer, tokenizer))
        z = config.beta * (gains[0] - gains[1])
        losses = math.log1p(math.exp(-z)), math.log1p(math.exp(z))
        expected.append(weight * (p * losses[0] + (1 - p) * losses[1]))
        assert trained_loss(trainer, [trainer.train_dataset[n]]) == pytest.approx(
            expected[-1], abs=5e-5
        )
    rows = [trainer.train_dataset[n] for n in range(3)]
    assert trained_loss(trainer, rows) == pytest.approx(sum(expected) / 3, abs=5e-5)


def test_certain_labels_of_equal_weight_train_exactly_the_weights_of_hard_ones(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    dataset = pairs_with(tmp_path / "d", [1.0] * 8)
    trained = []
    for labels in ("hard", "soft"):
        config = make_config(
            labels=labels,
            dtype="bfloat16",
            gradient_checkpointing=True,
            batch_size=2,
            accumulation=2,
            max_steps=3,
            probe=None,
        )
        runtime = TrainingRuntime(log_steps=1, save_steps=1)
        result = train(config, dataset, tmp_path / labels, runtime, progress=silent)
        trained.append((saved_weights(tmp_path / labels, result), result.metrics))
    (hard, metrics), (soft, theirs) = trained
    assert equal(hard, soft)
    assert metrics == theirs
    assert metrics["rewards/margins"] > 0.01  # it did train


def test_labels_that_say_nothing_teach_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    # At the start z = 0 and σ(0) - 0.5 = 0: no gradient, so no step, however many are made.
    dataset = pairs_with(tmp_path / "d", [0.5, 0.5, 0.5, 0.5])
    hard, soft = (
        train(
            make_config(labels=labels, max_steps=3, probe=None),
            dataset,
            tmp_path / labels,
            TrainingRuntime(log_steps=1, save_steps=1),
            progress=silent,
        ).metrics["rewards/margins"]
        for labels in ("hard", "soft")
    )
    assert hard > 0.01
    assert soft == 0


@pytest.mark.parametrize("probability", [None, math.nan, 1.2])
def test_soft_labels_need_probabilities(
    probability: float | None, make_config: MakeConfig, tmp_path: Path
) -> None:
    dataset = pairs_with(tmp_path / "d", [0.9, probability])
    trainer_for(make_config(), dataset, tmp_path / "hard")
    with pytest.raises(InputError, match=r"p-paint thing0: .* is (None|nan|1.2), .*labels: hard"):
        trainer_for(make_config(labels="soft"), dataset, tmp_path / "soft")


def test_adapters_on_four_bit_weights_train_in_float32(
    make_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    import torch

    trainer = trainer_for(make_config(weights="qlora"), red_pairs, tmp_path)
    trainable = [p for p in trainer.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trainable} == {torch.float32}


def test_dropout_in_the_adapter_is_really_there_and_the_base_has_none(
    make_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    import torch

    from training.adapters import LoraConfig

    config = make_config(lora=LoraConfig(dropout=0.25))
    policy = trainer_for(config, red_pairs, tmp_path).model
    shares = {
        name: module.p
        for name, module in policy.named_modules()
        if isinstance(module, torch.nn.Dropout)
    }
    assert shares
    assert all(share == (0.25 if "lora_dropout" in name else 0) for name, share in shares.items())
