"""Training in float16: the loss is scaled, and a step whose scale was too large is skipped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from preferences.errors import InputError, ServiceError
from training import adapters, models
from training.dpo import DPOConfig
from training.loop import train
from training.methods import Alignment
from training.run import TrainingRuntime
from training.sampling import sample
from training.settings import training_arguments

MakeConfig = Callable[..., DPOConfig]


class Steps:
    """Training of one weight by a scaled loss, with the guard as the loop calls it."""

    def __init__(self, scale: float) -> None:
        import torch
        from accelerate import Accelerator  # type: ignore[import-untyped]
        from accelerate.optimizer import AcceleratedOptimizer  # type: ignore[import-untyped]

        Accelerator(cpu=True)  # the optimizer asks which one there is
        self.model = torch.nn.Linear(1, 1, bias=False)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        inner = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.optimizer = AcceleratedOptimizer(inner, device_placement=False, scaler=self.scaler)

    def step(self, factor: float) -> None:
        import torch
        from transformers import TrainerState

        from training.hooks import FiniteGradients

        loss = (self.model(torch.ones(1, 1)) * factor).sum()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer.optimizer)
        FiniteGradients().on_pre_optimizer_step(
            None, TrainerState(), None, model=self.model, optimizer=self.optimizer
        )
        self.optimizer.step()
        self.optimizer.zero_grad()


def test_a_step_whose_scale_is_too_large_is_skipped_and_the_run_goes_on() -> None:
    # 1e37·65,536 is more than the 3.4e38 that float32 holds; 1e37·16 is not.
    training = Steps(scale=65_536.0)
    before = training.model.weight.item()
    training.step(1e37)
    assert training.model.weight.item() == before
    assert training.scaler.get_scale() == 32_768.0
    training.step(1.0)
    # The gradient of w·1 is 1, and the step 0.1 of it.
    assert training.model.weight.item() == pytest.approx(before - 0.1)


def test_a_gradient_that_no_scale_makes_finite_ends_the_run_before_it_is_stepped() -> None:
    training = Steps(scale=65_536.0)
    before = training.model.weight.item()
    skipped = 0
    with pytest.raises(ServiceError, match="not a finite number; lower learning_rate"):
        for _ in range(100):
            training.step(float("nan"))
            skipped += 1
    # 65,536 is 2 to the 16th: the seventeenth halving takes it below 1.
    assert skipped == 17
    assert training.model.weight.item() == before


def test_the_trainer_is_told_to_scale(make_config: MakeConfig, tmp_path: Path) -> None:
    told = {
        dtype: training_arguments(make_config(dtype=dtype), TrainingRuntime(), tmp_path, False)
        for dtype in ("float32", "bfloat16", "float16")
    }
    assert {dtype: (a["bf16"], a["fp16"]) for dtype, a in told.items()} == {
        "float32": (False, False),
        "bfloat16": (True, False),
        "float16": (False, True),
    }


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "trains on a GPU alone; say bfloat16 or float32"),
        ({"method": "ppo"}, "ppo has none; say bfloat16 or float32"),
        ({"weights": "ln_tuning"}, "weights: ln_tuning, which are float32"),
    ],
)
def test_where_float16_cannot_be_trained_it_is_refused_with_a_cure(
    settings: dict[str, Any], told: str, model: str, red_pairs: Path, tmp_path: Path
) -> None:
    import torch

    if torch.cuda.is_available() and not settings:
        pytest.skip("there is a GPU")
    config = TypeAdapter(Alignment).validate_python(
        {"model": model, "dtype": "float16", **settings}
    )
    with pytest.raises(InputError) as refused:
        train(config, red_pairs, tmp_path / "run")
    assert told in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("weights", ["full", "lora", "prefix_tuning"])
def test_a_float16_model_is_sampled_and_what_trains_stays_in_float32(
    weights: models.Weights, make_config: MakeConfig
) -> None:
    import torch

    config = make_config(weights=weights, dtype="float16")
    tokenizer = models.load_tokenizer(config.model, None)
    model = models.load_model(config.model, None, weights, "float16")
    model = adapters.put_on(model, config)
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert trained == {torch.float32}
    assert frozen <= {torch.float16}
    asked: Any = {"ends": {3}, "max_tokens": 4, "temperature": 0.0, "seed": 0, "batch_size": 2}
    answers = sample(model, tokenizer, [[2, 4, 13], [2, 4]], bf16=False, **asked)
    assert len(answers) == 2
