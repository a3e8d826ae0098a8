"""The loop of PPO over its steps, which meets `training.loop.Trainer`.

This module imports torch and transformers at its head, so it is imported inside functions only.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerState, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, TrainerControl

from training import models
from training.actors import load_actors
from training.data import HeldOutPrompt
from training.kl_control import next_coefficient
from training.over_optimisation import Guard
from training.ppo import PPOConfig
from training.ppo_step import take_step
from training.prober import Prober
from training.prompts import Prompts
from training.rewards import (
    answers_to,
    require_same_reward,
    reward_fingerprint,
    scale_of_rewards,
    scores_of,
)
from training.rollouts import Answer, Rollouts, as_rollouts, prompts_of_step, seed_of_step
from training.run import TrainingRuntime, write_json
from training.settings import SCHEDULES, training_arguments
from training.shared_rollouts import words


def arguments(config: PPOConfig, runtime: TrainingRuntime, output: Path) -> TrainingArguments:
    """The settings as transformers names them, for its optimizers and callbacks."""
    shared = training_arguments(config, runtime, output, evaluate=False)
    # Adam's own ε of 1e-8 makes steps of almost full size out of almost no gradient.
    return TrainingArguments(**shared, adam_epsilon=1e-5)


def build_optimizer(
    config: PPOConfig, args: TrainingArguments, parameters: Iterable[nn.Parameter], updates: int
) -> tuple[Any, Any]:
    """The optimizer, AdamW with PPO's ε if it is AdamW, and its schedule over so many updates."""
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    trained = list(parameters)
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = kind(groups, **settings)
    scheduler = get_scheduler(
        SCHEDULES[config.schedule],
        optimizer,
        num_warmup_steps=math.ceil(config.warmup_share * updates),
        num_training_steps=updates,
    )
    return optimizer, scheduler


class PPOTrainer:
    """Samples, scores and learns, step by step."""

    def __init__(
        self, config: PPOConfig, runtime: TrainingRuntime, output: Path, prompts: Prompts
    ) -> None:
        torch.manual_seed(config.seed)  # of the adapter's start
        self.config, self.output, self.prompts = config, output, prompts.prompts
        self.actors = load_actors(config)
        self.model = self.actors.policy
        self.forward_pass = words(self.actors.unshared)
        """Which one runs and why, in words that the run says to people."""
        self.processing_class = models.load_tokenizer(config.model, config.revision)
        self.ends = models.end_tokens(config.model, config.revision, self.processing_class)
        self.pad = self.processing_class.pad_token_id
        steps = config.max_steps or math.ceil(
            (config.epochs or 1.0) * len(self.prompts) / config.rollouts
        )
        updates = steps * config.passes * config.rollouts // config.update
        self.args = arguments(config, runtime, output)
        self.optimizer, self.scheduler = build_optimizer(
            config, self.args, self.actors.trained().values(), updates
        )
        self.coefficient = config.kl.coefficient
        self.handed_over = output / "policy"
        """The policy as it is now, for a sampler that was handed in."""
        self.shift, self.scale = 0.0, 1.0
        """What is taken off the reward model's raw scores, and what they are then divided by."""
        self.scores: dict[int, float] = {}
        """Mean score by step."""
        self.state: Any = TrainerState(max_steps=steps)
        self.control = TrainerControl()
        reports: Any = get_reporting_integration_callbacks
        handler: Any = CallbackHandler
        self.callbacks = handler(
            [DefaultFlowCallback, *reports(self.args.report_to)],
            self.model,
            self.processing_class,
            self.optimizer,
            self.scheduler,
        )

    def add_callback(self, callback: Any) -> None:
        """Take a callback in, and behind probes a guard against over-optimisation."""
        self.callbacks.add_callback(callback)
        if isinstance(callback, Prober):
            self.callbacks.add_callback(Guard(callback, self.scores))

    def remove_callback(self, callback: Any) -> None:
        """Take one out, by itself or by its class."""
        self.callbacks.remove_callback(callback)

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """Go to the last step, from a checkpoint if one is named."""
        config, state = self.config, self.state
        if resume_from_checkpoint is not None:
            self._load(Path(resume_from_checkpoint))
        elif config.reward_model is not None:
            self._normalise()
        state.compute_steps(self.args, state.max_steps)
        self.control = self.callbacks.on_train_begin(self.args, state, self.control)
        unlogged: list[dict[str, float]] = []
        while state.global_step < state.max_steps and not self.control.should_training_stop:
            step = state.global_step + 1
            # All noise of a step comes from here, so none has to be kept in checkpoints.
            torch.manual_seed(seed_of_step(config.seed, step))
            self.control = self.callbacks.on_step_begin(self.args, state, self.control)
            unlogged.append(self._step(step))
            state.global_step = step
            state.epoch = step * config.rollouts / len(self.prompts)
            self.control = self.callbacks.on_step_end(self.args, state, self.control)
            if self.control.should_log:
                self._log(unlogged)
                unlogged = []
            if self.control.should_save:
                self._save(self.output / f"checkpoint-{step}")
                self.control = self.callbacks.on_save(self.args, state, self.control)
        self.control = self.callbacks.on_train_end(self.args, state, self.control)
        shutil.rmtree(self.handed_over, ignore_errors=True)

    def _step(self, step: int) -> dict[str, float]:
        config = self.config
        places = prompts_of_step(len(self.prompts), config.rollouts, config.seed, step)
        asked = [self.prompts[place] for place in places]
        rollouts = self._rollouts(asked, self._sample(asked, seed_of_step(config.seed, step)))
        scores, parts = self._score(rollouts)
        rate = self.scheduler.get_last_lr()[0]
        found = take_step(
            config,
            self.actors,
            self.optimizer,
            self.scheduler,
            rollouts,
            scores,
            self.coefficient,
            step,
            lambda: self.callbacks.on_pre_optimizer_step(self.args, self.state, self.control),
        )
        found |= parts | {"kl_coefficient": self.coefficient, "learning_rate": rate}
        self.scores[step] = found["score"]
        self.coefficient = next_coefficient(
            config.kl, self.coefficient, found["kl"], config.rollouts
        )
        return found

    def _sample(self, asked: list[HeldOutPrompt], seed: int) -> list[Answer]:
        """An answer to each prompt by the policy as it is now."""
        return answers_to(
            asked,
            self.config,
            self.model,
            self.processing_class,
            self.ends,
            seed,
            self.handed_over,
        )

    def _rollouts(self, asked: list[HeldOutPrompt], answers: list[Answer]) -> Rollouts:
        return as_rollouts(asked, answers, self.processing_class, self.pad, self.model.device)

    def _score(self, rollouts: Rollouts) -> tuple[Tensor, dict[str, float]]:
        """Each answer's score, (B,), and the mean of its parts where there are several."""
        return scores_of(rollouts, self.config, self.actors, self.shift, self.scale)

    def _normalise(self) -> None:
        """Bring the reward model to mean 0 and deviation 1 over the reference's finished answers,
        and let the critic start as the reward model."""
        self.shift, self.scale = scale_of_rewards(
            self.prompts, self.config, self.actors, self.model, self.processing_class, self.ends
        )
        head, value = self.actors.reward_head, self.actors.value_head
        assert head is not None
        with torch.no_grad():
            value.weight.copy_(head.weight / self.scale)
            value.bias.fill_((float(head.bias or 0.0) - self.shift) / self.scale)

    def _log(self, steps: list[dict[str, float]]) -> None:
        """The means over the steps since the last log; what was not a number is left out."""
        means = {}
        for name in steps[0]:
            values = [found[name] for found in steps if math.isfinite(found[name])]
            if values:
                means[name] = math.fsum(values) / len(values)
        self.control.should_log = False
        self.control = self.callbacks.on_log(self.args, self.state, self.control, means)

    def _save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(
            {
                "trained": {n: p.detach() for n, p in self.actors.trained().items()},
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
            },
            folder / "training.pt",
        )
        values = {
            "step": self.state.global_step,
            "kl_coefficient": self.coefficient,
            "shift": self.shift,
            "scale": self.scale,
            "scores": list(self.scores.values()),
            "reward_model": reward_fingerprint(self.config),
        }
        write_json(folder / "ppo.json", values)

    def _load(self, folder: Path) -> None:
        values = json.loads((folder / "ppo.json").read_text())
        require_same_reward(self.config, values["reward_model"])
        saved = torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, parameter in self.actors.trained().items():
                parameter.copy_(saved["trained"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        self.state.global_step = values["step"]
        self.coefficient = values["kl_coefficient"]
        self.shift, self.scale = values["shift"], values["scale"]
        self.scores.update(enumerate(values["scores"], start=1))
