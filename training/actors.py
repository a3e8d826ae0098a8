"""The four models of PPO on one base: policy, reference, reward and value.

The policy is the base with its adapter on, the reference the same with all adapters off, the
reward model the same with an adapter of its own, and the value a linear head on the policy's last
hidden states. So one base, 4-bit or not, is held and not four. Only where weights of the base
itself train, or adapters of two kinds would meet, a second copy carries reference and reward.

This module imports trl at its head, so it is imported inside functions only.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from preferences.errors import InputError
from training import adapters, models
from training.adapters import LoraConfig, WeightsConfig
from training.rollouts import Rollouts
from training.shared_prefix import head_of
from training.shared_rollouts import Packed, base_of, packed, share, spread, states_of

if TYPE_CHECKING:
    from training.ppo import PPOConfig
    from training.rewarded import RewardedConfig

POLICY, REWARD = "default", "reward"
"""The names of the adapters on the base; the first is peft's own."""

LOW_RANK = ("lora", "dora", "qlora", "qdora")
"""Weights beside which the adapter of a reward model fits on one base."""


class Rewarding(Protocol):
    """What reads rewards; `Actors` do."""

    @property
    def frozen(self) -> Any:
        """What carries the reward model's adapter."""

    @property
    def reward_head(self) -> nn.Linear | None:
        """(hidden) → 1, in float32; None where only functions reward."""

    @property
    def bf16(self) -> bool:
        """Whether it computes in bfloat16."""

    @property
    def unshared(self) -> str | None:
        """Why it does not read packed rows; None where it does."""


@dataclass(frozen=True, slots=True)
class RewardModel:
    """A reward model beside a policy that something else trains."""

    frozen: Any = None
    reward_head: nn.Linear | None = None
    bf16: bool = False
    unshared: str | None = "nothing is read"


@dataclass(frozen=True, slots=True)
class Actors:
    """Who plays in a step."""

    policy: Any
    """The model whose weights train; peft's, where there is an adapter."""
    value_head: nn.Linear
    """(hidden) → 1, in float32; it trains with the policy."""
    frozen: Any
    """What carries reference and reward: the policy itself, or a copy of what it started from."""
    reward_head: nn.Linear | None = None
    """(hidden) → 1, in float32; None where only functions reward."""
    bf16: bool = False
    """Whether the models compute in bfloat16; heads and probabilities always are float32."""
    unshared: str | None = "nobody has looked"
    """Why rows are read with padding and repeated prompts, as `shared_rollouts` says; None where
    they are packed."""

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name."""
        policy = {n: p for n, p in self.policy.named_parameters() if p.requires_grad}
        return policy | {f"value_head.{n}": p for n, p in self.value_head.named_parameters()}


@dataclass(frozen=True, slots=True)
class Readings:
    """What a model says of the tokens of rollouts; (B, answer length), as `Rollouts.mask`."""

    log_probs: Tensor
    """Of each sampled token, in nats, at the sampling temperature."""
    hidden: Tensor
    """(N, hidden): the states that the N tokens of `Rollouts.mask` were sampled in."""
    entropy: Tensor | None
    """Of the distribution each was sampled from, in nats; None while gradients are on, where it
    would only cost memory."""


def load_actors(config: PPOConfig) -> Actors:
    """The actors of a configuration, freshly loaded: the policy still is the reference, and the
    value is 0 everywhere."""
    policy = adapters.put_on(_base(config), config, config.gradient_checkpointing)
    frozen, reward_head = load_frozen(config, policy)
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    value_head = nn.Linear(policy.get_output_embeddings().weight.shape[1], 1)
    nn.init.zeros_(value_head.weight)
    nn.init.zeros_(value_head.bias)
    # No dropout is on, so the mode changes nothing but whether activations are computed again.
    policy.train(config.gradient_checkpointing)
    unshared = share(policy, config.temperature)
    if frozen is not policy and unshared is None:
        unshared = share(frozen, config.temperature)
    return Actors(
        policy,
        value_head.to(policy.device),
        frozen,
        reward_head,
        config.dtype == "bfloat16",
        unshared,
    )


def load_frozen(config: RewardedConfig, policy: Any) -> tuple[Any, nn.Linear | None]:
    """What carries reference and reward beside a policy, and the reward model's head.

    It is the policy itself where all of them are adapters on one base, and otherwise a copy of what
    the policy started from.
    """
    shared = models.has_adapter(config.weights) and (
        config.reward_model is None or config.weights in LOW_RANK
    )
    frozen = policy
    if not shared:
        frozen = _base(config)
        if config.reward_model is not None:
            # An adapter that changes nothing: peft adds another only to a model that has one.
            idle = WeightsConfig(weights="lora", lora=LoraConfig(rank=1))
            frozen = adapters.put_on(frozen, idle)
        frozen.requires_grad_(False)
    reward_head = None
    if config.reward_model is not None:
        from training.reward_head import add_adapter

        reward_head = add_adapter(frozen, reward_adapter(config), REWARD)
    if models.has_adapter(config.weights):
        # The reward model's adapter is not part of what was trained.
        policy.save_pretrained = functools.partial(
            policy.save_pretrained, selected_adapters=[POLICY]
        )
    return frozen, reward_head


def _base(config: RewardedConfig) -> Any:
    from trl.trainer.utils import disable_dropout_in_model

    model = models.load_model(config.model, config.revision, config.weights, config.dtype)
    disable_dropout_in_model(model)
    if torch.cuda.is_available() and not models.is_quantised(config.weights):
        model = model.to("cuda")
    return model.eval()


def reward_adapter(config: RewardedConfig) -> Path:
    """The adapter's folder in a reward model's run; InputError if none fits this base."""
    run = Path(str(config.reward_model))
    folder = run / "adapter" if (run / "adapter").is_dir() else run
    try:
        trained = json.loads((folder / models.TRAINED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(
            f"reward_model: {run} holds no adapter of a reward model; train one with weights: "
            f"{config.weights if config.weights in LOW_RANK else 'lora'} on {config.model}, or "
            "name a function under reward_functions"
        ) from None
    if models.is_quantised(trained["weights"]) != models.is_quantised(config.weights):
        raise InputError(
            f"reward_model: {run} was trained with weights: {trained['weights']}, on another base "
            f"than that of weights: {config.weights}; take both in 4 bits or neither"
        )
    return folder


def read_policy(
    actors: Actors, rollouts: Rollouts, rows: Tensor, temperature: float
) -> tuple[Readings, Tensor]:
    """The policy's readings of some rows and the values of its states, (B, answer length)."""
    read = _read_packed if actors.unshared is None else _read
    readings = read(actors.policy, rollouts, rows, temperature, actors.bf16)
    return readings, spread(actors.value_head(readings.hidden)[:, 0], rollouts.mask[rows])


def read_reference(actors: Actors, rollouts: Rollouts, rows: Tensor, temperature: float) -> Tensor:
    """The reference's log-probabilities of some rows, (B, answer length), without gradient."""
    read = _read_packed if actors.unshared is None else _read
    with torch.no_grad(), adapters.reference(actors.frozen):
        return read(actors.frozen, rollouts, rows, temperature, actors.bf16).log_probs


def read_reward(actors: Rewarding, rollouts: Rollouts, rows: Tensor) -> Tensor:
    """The reward model's raw score of some rows, (B,): its head on their last tokens' states."""
    assert actors.reward_head is not None
    tokens, present = rollouts.tokens[rows], rollouts.present[rows]
    with (
        torch.no_grad(),
        torch.autocast(tokens.device.type, torch.bfloat16, actors.bf16),
        _adapter_on(actors.frozen, REWARD),
    ):
        # The body alone: nobody asks the reward model for tokens.
        if actors.unshared is None:
            batch = _packed(rollouts, rows)
            pooled = states_of(actors.frozen, batch)[batch.ends]
        else:
            body = base_of(actors.frozen).base_model
            states = body(input_ids=tokens, attention_mask=present.long()).last_hidden_state
            ends = present.sum(dim=1) - 1
            pooled = states[torch.arange(len(rows), device=states.device), ends]
    with torch.no_grad():
        scores: Tensor = actors.reward_head(pooled.float())[..., 0]
    return scores


def _packed(rollouts: Rollouts, rows: Tensor) -> Packed:
    scored = rollouts.present[rows]
    scored[:, : rollouts.start] = False
    scored[:, rollouts.start :] = rollouts.mask[rows]
    return packed(rollouts.tokens[rows], rollouts.present[rows], scored)


def _read_packed(
    model: Any, rollouts: Rollouts, rows: Tensor, temperature: float, bf16: bool
) -> Readings:
    batch = _packed(rollouts, rows)
    with torch.autocast(batch.targets.device.type, torch.bfloat16, bf16):
        hidden = states_of(model, batch)[batch.before]
        log_probs, entropy, *_ = head_of(base_of(model), temperature)(hidden, batch.targets)
    mask = rollouts.mask[rows]
    entropies = None if torch.is_grad_enabled() else spread(entropy, mask)
    return Readings(spread(log_probs, mask), hidden.float(), entropies)


def _read(model: Any, rollouts: Rollouts, rows: Tensor, temperature: float, bf16: bool) -> Readings:
    tokens, present = rollouts.tokens[rows], rollouts.present[rows]
    length = tokens.shape[1] - rollouts.start
    with (
        torch.autocast(tokens.device.type, torch.bfloat16, bf16),
        _captured_input(model.get_output_embeddings()) as captured,
    ):
        logits = model(
            input_ids=tokens,
            attention_mask=present.long(),
            logits_to_keep=length + 1,
            use_cache=False,
        ).logits
    # The state before a token decides it. Counted from the end: some adapters put virtual tokens
    # before the first one, and some models return all positions whatever they are asked for.
    logits, hidden = (found[:, -length - 1 : -1].float() for found in (logits, captured[-1]))
    # The sampled policy is softmax(logits/temperature), so that is what everything speaks of.
    distribution = (logits / temperature).log_softmax(-1)
    sampled = tokens[:, rollouts.start :, None]
    entropy = None
    if not torch.is_grad_enabled():
        entropy = -(distribution.exp() * distribution).sum(-1)
    log_probs = distribution.gather(-1, sampled)[..., 0]
    return Readings(log_probs, hidden[rollouts.mask[rows]], entropy)


@contextlib.contextmanager
def _captured_input(head: nn.Module) -> Iterator[list[Tensor]]:
    """What goes into the language model's head: the last hidden states, of every kind of model.

    Asking for `output_hidden_states` would keep those of all layers.
    """
    captured: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    try:
        yield captured
    finally:
        hook.remove()


@contextlib.contextmanager
def _adapter_on(model: Any, name: str) -> Iterator[None]:
    """Inside, the adapter `name` is on in place of the one that was; what trains stays the same."""
    before = model.active_adapter
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter(before)
        # peft lets the adapter that is on train, and no other.
        model.requires_grad_(False)
        for parameter in trains:
            parameter.requires_grad_(True)
