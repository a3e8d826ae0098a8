"""TRL's trainers of RLOO and GRPO, on answers and scores of ours.

Which prompts are asked, with which noise and in which order their answers are learnt from follows
from the seed and the step alone, as in PPO. TRL 1.16 would go on after an interruption with answers
sampled anew, in another phase of its passes, so what was sampled is part of every checkpoint. This
module imports trl at its head, so it is imported inside functions only.
"""

from __future__ import annotations

import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from trl.trainer.utils import add_fused_lm_head

from training import adapters, models
from training.actors import RewardModel, load_frozen
from training.advantages import end_scores
from training.data import HeldOutPrompt
from training.group_relative import GroupRelativeConfig
from training.hooks import Tokenized
from training.over_optimisation import Guard
from training.prober import Prober
from training.rewards import (
    answers_to,
    require_same_reward,
    reward_fingerprint,
    scale_of_rewards,
    scores_of,
)
from training.rollouts import Answer, as_rollouts, prompts_of_step, seed_of_step
from training.shared_rollouts import base_of, share, words
from training.trl_samplers import GRPOTrainer, RLOOTrainer

SAMPLED = "sampled.pt"
"""In a checkpoint: the answers that are still learnt from, and what their scores depend on."""

METRICS = {
    "score": "score",
    "without_end": "without_end",
    "completions/mean_length": "answer_tokens",
    "kl": "kl",
    "entropy": "entropy",
    "frac_reward_zero_std": "groups_alike",
    "clip_ratio/region_mean": "clip_share",
}
"""What is logged, by TRL's name and ours, which are PPO's; with all parts of the score."""


class Order(Sampler[int]):
    """Which prompt each place of each batch belongs to, over the whole run."""

    def __init__(self, config: GroupRelativeConfig, prompts: int, steps: int) -> None:
        self.config, self.prompts = config, prompts
        self.times = math.ceil(steps / config.updates)
        """How often is sampled."""

    def __len__(self) -> int:
        return self.times * self._batches * self.config.rollouts

    def __iter__(self) -> Iterator[int]:
        config = self.config
        for time in range(1, self.times + 1):
            asked = config.rollouts // config.samples
            places = prompts_of_step(self.prompts, asked, config.seed, time)
            # TRL draws the whole again for every batch that is made of it, and looks at the first.
            for _ in range(self._batches):
                for place in places:
                    yield from [place] * config.samples

    @property
    def _batches(self) -> int:
        return self.config.updates * self.config.accumulation


class GroupRelative(Tokenized):
    """Goes before a trainer of TRL's that samples."""

    accelerator: Any
    args: Any
    model: Any
    processing_class: Any
    state: Any
    _buffered_inputs: Any
    _metrics: Any
    _step: int

    def __init__(
        self,
        config: GroupRelativeConfig,
        prompts: Sequence[HeldOutPrompt],
        output: Path,
        model: Any,
        args: Any,
        adapter: Any,
    ) -> None:
        tokenizer = models.load_tokenizer(config.model, config.revision)
        self.config, self.prompts = config, {prompt.prompt_id: prompt for prompt in prompts}
        self.ends = models.end_tokens(config.model, config.revision, tokenizer)
        self.handed_over = output / "policy"
        """The policy as it is now, for a sampler that was handed in."""
        self.asked: list[HeldOutPrompt] = []
        """The prompts of the answers that are being sampled, one by one."""
        self.shift, self.scale = 0.0, 1.0
        """What is taken off the reward model's raw scores, and what they are then divided by."""
        self.scores: dict[int, float] = {}
        """Mean score of the answers sampled before a step."""
        self.tokens = 0.0
        """Mean length of the answers sampled last."""
        trl: Any = super()
        trl.__init__(
            model=model,
            args=args,
            reward_funcs=self._score,
            # TRL hands on what it finds as a prompt: here it is the prompt's id.
            train_dataset=Dataset.from_dict({"prompt": list(self.prompts)}),
            processing_class=tokenizer,
            # The configuration, not a ready adapter: for that TRL would add a second one.
            peft_config=adapter,
        )
        adapters.keep_in_float32(self.model)
        unshared = share(self.model, config.temperature)
        self.forward_pass = words(unshared)
        """Which one runs and why, in words that the run says to people."""
        self.judged = RewardModel()
        needs_reference = config.beta > 0 and not models.has_adapter(config.weights)
        if config.reward_model is not None or needs_reference:
            frozen, head = load_frozen(config, self.model)
            if needs_reference:
                self._refer_to(frozen)
            if frozen is not self.model:
                unshared = share(frozen, config.temperature)
            self.judged = RewardModel(frozen, head, config.dtype == "bfloat16", unshared)

    def _refer_to(self, frozen: Any) -> None:
        """Take a model for the reference, where there is no adapter to switch off.

        TRL would load one more by the model's name, in whatever revision is the newest.
        """
        base = base_of(frozen)
        add_fused_lm_head(base, temperature=self.config.temperature)
        self.ref_model = self.accelerator.prepare_model(base, evaluation_mode=True)
        self.beta = self.config.beta

    def add_callback(self, callback: Any) -> None:
        """Take a callback in, and behind probes a guard against over-optimisation."""
        trl: Any = super()
        trl.add_callback(callback)
        if isinstance(callback, Prober):
            trl.add_callback(Guard(callback, self.scores))

    def train(self, resume_from_checkpoint: Any = None, *_: Any, **__: Any) -> Any:
        """Go to the end, from a checkpoint if one is named."""
        config = self.config
        if resume_from_checkpoint is not None:
            self._take_up(Path(resume_from_checkpoint))
        elif config.reward_model is not None:
            self.shift, self.scale = scale_of_rewards(
                list(self.prompts.values()),
                config,
                self.judged,
                self.model,
                self.processing_class,
                self.ends,
            )
        trl: Any = super()
        done = trl.train(resume_from_checkpoint=resume_from_checkpoint)
        shutil.rmtree(self.handed_over, ignore_errors=True)
        return done

    def _take_up(self, checkpoint: Path) -> None:
        saved = torch.load(checkpoint / SAMPLED, weights_only=True)
        require_same_reward(self.config, saved["reward_model"])
        self._buffered_inputs, self._step = saved["answers"], saved["batches"]
        self.shift, self.scale, self.tokens = saved["shift"], saved["scale"], saved["tokens"]
        self.scores.update(saved["scores"])

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        trl: Any = super()
        trl._save_checkpoint(model, trial)
        values = {
            "answers": self._buffered_inputs,
            "batches": self._step,
            "shift": self.shift,
            "scale": self.scale,
            "tokens": self.tokens,
            "scores": self.scores,
            "reward_model": reward_fingerprint(self.config),
        }
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        torch.save(values, folder / SAMPLED)

    def _get_train_sampler(self, dataset: Any = None) -> Order:
        return Order(self.config, len(self.prompts), self.args.max_steps)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        # Of the order in which answers are learnt from; sampling has its own.
        torch.manual_seed(self._seed())
        trl: Any = super()
        return trl._generate_and_score_completions(inputs)

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        self.asked = [self.prompts[prompt_id] for prompt_id in prompts]
        return [list(prompt.ids) for prompt in self.asked], None, {}

    def _answers(self) -> list[list[int]]:
        found = answers_to(
            self.asked,
            self.config,
            self.model,
            self.processing_class,
            self.ends,
            self._seed(),
            self.handed_over,
        )
        return [list(answer.ids) for answer in found]

    def _seed(self) -> int:
        return seed_of_step(self.config.seed, self.state.global_step + 1)

    def _score(
        self, completion_ids: list[list[int]], log_metric: Callable[[str, float], None], **_: Any
    ) -> list[float]:
        tokenizer, config = self.processing_class, self.config
        answers = [Answer(tuple(ids), ids[-1] in self.ends) for ids in completion_ids]
        device = self.accelerator.device
        rollouts = as_rollouts(self.asked, answers, tokenizer, tokenizer.pad_token_id, device)
        found, parts = scores_of(rollouts, config, self.judged, self.shift, self.scale)
        scores = end_scores(found, rollouts.finished, config.missing_end_score)
        mean = float(scores.mean())
        self.scores[self.state.global_step + 1] = mean
        self.tokens = float(rollouts.mask.sum(dim=1).float().mean())
        cut = 1 - float(rollouts.finished.float().mean())
        for name, value in {"score": mean, "without_end": cut, **parts}.items():
            log_metric(name, value)
        values: list[float] = scores.tolist()
        return values

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """By the names that PPO's metrics have, and KL in nats an answer."""
        found = self._metrics["train"]
        lengths = found.get("completions/mean_length") or [self.tokens]
        # TRL has the mean over all tokens.
        found["kl"] = [value * sum(lengths) / len(lengths) for value in found.get("kl", [])]
        kept = {ours: found[theirs] for theirs, ours in METRICS.items() if found.get(theirs)}
        kept |= {name: values for name, values in found.items() if name.startswith("score/")}
        self._metrics["train"] = defaultdict(list, kept)
        # The run is one pass over `Order`; people count passes over the prompts.
        config = self.config
        answers = self.state.global_step * config.update / config.passes
        self.state.epoch = answers / config.samples / len(self.prompts)
        trl: Any = super()
        trl.log(logs, start_time)


class RLOO(GroupRelative, RLOOTrainer):
    """RLOOTrainer on answers and scores of ours."""

    def _generate_single_turn(self, *_: Any, **__: Any) -> list[list[int]]:
        return self._answers()


class GRPO(GroupRelative, GRPOTrainer):
    """GRPOTrainer on answers and scores of ours."""

    def _generate_single_turn(self, *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        return self._answers(), None
