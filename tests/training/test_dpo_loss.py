"""The loss that is trained is the one of the paper, on the tokens it should be on."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training.dpo import DPOConfig, build_trainer
from training.models import end_tokens, load_tokenizer
from training.run import TrainingRuntime

MakeConfig = Callable[..., DPOConfig]


def trainer_for(config: DPOConfig, dataset: Path, output: Path) -> Any:
    from training.data import load_pairs

    tokenizer = load_tokenizer(config.model, None)
    ends = end_tokens(config.model, None, tokenizer)
    pairs = load_pairs(dataset, "train", tokenizer, ends=ends, max_length=config.max_length)
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
