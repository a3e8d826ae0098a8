"""RLOO and GRPO: advantages and gradients as the papers write them, and settings that fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from preferences.errors import InputError
from preferences.records import Messages
from tests.training.conftest import silent
from tests.training.groups import EACH, settings_for, write_two_prompts
from training.group_relative import GroupRelativeConfig, GRPOConfig, RLOOConfig, build_trainer
from training.rewarded import load_data, train
from training.rollouts import Answer


def number_of_reds(messages: Messages, answer: str) -> float:
    return float(answer.split().count("red"))


@pytest.fixture
def settings(model: str) -> dict[str, Any]:
    return settings_for(model)


@pytest.fixture
def two_prompts(tmp_path: Path) -> Path:
    return write_two_prompts(tmp_path / "two")


class Scripted:
    """To the first prompt of a step 1, 2, 3 and 6 times red, to the second 1, 1, 1 and 5 times."""

    counts = (1, 2, 3, 6, 1, 1, 1, 5)

    def __init__(self, tokenizer: Any) -> None:
        self.red, self.end = tokenizer.convert_tokens_to_ids(["red", "<end>"])
        self.rows: list[tuple[list[int], list[int]]] = []
        """The prompts and answers of the last step."""

    def __call__(self, policy: Path, prompts: Sequence[Any], **_: Any) -> list[Answer]:
        assert [*map(list, prompts)] == [list(prompts[0])] * 4 + [list(prompts[4])] * 4
        assert prompts[0] != prompts[4]
        said = [[self.red] * n + [self.end] for n in self.counts]
        self.rows = [(list(p), ids) for p, ids in zip(prompts, said, strict=True)]
        return [Answer(tuple(ids), finished=True) for ids in said]


def scripted(config: GroupRelativeConfig, dataset: Path, output: Path) -> tuple[Any, Scripted]:
    """The real trainer, whose answers are scripted and scored by how often they say red."""
    from training.models import load_tokenizer

    tokenizer = load_tokenizer(config.model, None)
    script = Scripted(tokenizer)
    given: Any = config.given({"red": number_of_reds}, script)
    prompts, _ = load_data(given, dataset, tokenizer)
    assert prompts is not None
    return build_trainer(given, EACH, output, prompts, None), script


def learnt_from(trainer: Any) -> list[tuple[int, float]]:
    """How often each answer says red, and its advantage, in the order of those numbers."""
    found = [
        (int(reds) - 1, float(advantage))
        for batch in trainer._buffered_inputs
        for reds, advantage in zip(
            batch["completion_mask"].sum(1), batch["advantages"], strict=True
        )
    ]
    return sorted(found)


# Each answer against the mean of the other three: 1 − 11/3, 2 − 10/3, 3 − 9/3, 6 − 6/3; and of the
# second prompt 1 − 7/3 three times, 5 − 3/3.
LEAVE_ONE_OUT = sorted(
    [(1, -8 / 3), (2, -4 / 3), (3, 0.0), (6, 4.0)] + [(1, -4 / 3)] * 3 + [(5, 4.0)]
)
# Scores less their means, 3 and 2.
DIFFERENCES = [(1, -2.0), (1, -1.0), (1, -1.0), (1, -1.0), (2, -1.0), (3, 0.0), (5, 3.0), (6, 3.0)]
# The groups' deviations: √((4+1+0+9)/3) and √((1+1+1+9)/3) = 2.
SPREAD = math.sqrt(14 / 3) + 1e-4
BY_GROUP = sorted(
    [(1, -2 / SPREAD), (2, -1 / SPREAD), (3, 0.0), (6, 3 / SPREAD)]
    + [(1, -1 / 2.0001)] * 3
    + [(5, 3 / 2.0001)]
)
# All eight have mean 2.5 and squares of deviations 2.25·4 + .25 + .25 + 12.25 + 6.25 = 28.
BY_BATCH = [(n, difference / (2 + 1e-4)) for n, difference in DIFFERENCES]


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        (RLOOConfig, {}, LEAVE_ONE_OUT),
        (GRPOConfig, {}, BY_GROUP),
        (GRPOConfig, {"advantage_scale": "none"}, DIFFERENCES),
        (GRPOConfig, {"advantage_scale": "batch"}, BY_BATCH),
    ],
    ids=["rloo", "grpo", "dr_grpo", "batch"],
)
def test_advantages_are_those_of_the_papers(
    kind: type[GroupRelativeConfig],
    changes: dict[str, Any],
    expected: list[tuple[int, float]],
    settings: dict[str, Any],
    two_prompts: Path,
    tmp_path: Path,
) -> None:
    sizes = {"rollouts": 8, "batch_size": 8}
    trainer, _ = scripted(kind(**{**settings, **sizes, **changes}), two_prompts, tmp_path / "run")
    trainer.train()
    # The policy is its reference still, so nothing is charged.
    for ours, theirs in zip(learnt_from(trainer), expected, strict=True):
        assert ours[0] == theirs[0]
        assert ours[1] == pytest.approx(theirs[1], abs=1e-5)


def loss_by_hand(
    config: RLOOConfig | GRPOConfig, policy: Any, reference: Any, script: Scripted
) -> Any:
    """The loss of the scripted answers, written out answer by answer and without padding."""
    import torch

    def log_probs(model: Any, prompt: list[int], answer: list[int]) -> Any:
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        found = (logits / config.temperature).log_softmax(-1)
        return found[torch.arange(len(answer)), answer]

    ours = [log_probs(policy, *row) for row in script.rows]
    with torch.no_grad():
        theirs = [log_probs(reference, *row) for row in script.rows]
    kl = [float((o - t).sum()) for o, t in zip(ours, theirs, strict=True)]
    worth = [float(n) for n in script.counts]
    total: Any = 0.0
    if isinstance(config, RLOOConfig):
        worth = [r - config.beta * nats for r, nats in zip(worth, kl, strict=True)]
        for i, answer in enumerate(ours):
            group = range(i // 4 * 4, i // 4 * 4 + 4)
            advantage = worth[i] - sum(worth[j] for j in group if j != i) / 3
            total = total - advantage * answer.sum() / 8
        return total
    tokens = sum(len(answer) for answer in ours)
    for i, (answer, base) in enumerate(zip(ours, theirs, strict=True)):
        advantage = DIFFERENCES_IN_ORDER[i] / (SPREAD if i < 4 else 2.0001)
        k3 = (base - answer).exp() - (base - answer) - 1
        each = -advantage * answer + config.beta * k3
        divisor = {"grpo": 8 * len(answer), "dr_grpo": 8 * config.max_tokens, "dapo": tokens}
        total = total + each.sum() / divisor[config.loss]
    return total


DIFFERENCES_IN_ORDER = (-2.0, -1.0, 0.0, 3.0, -1.0, -1.0, -1.0, 3.0)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (RLOOConfig, {}),
        (GRPOConfig, {"loss": "grpo"}),
        (GRPOConfig, {"loss": "dr_grpo"}),
        (GRPOConfig, {"loss": "dapo"}),
    ],
    ids=["rloo", "grpo", "dr_grpo", "dapo"],
)
def test_an_update_follows_the_gradient_of_the_loss_as_it_is_written(
    kind: type[Any],
    changes: dict[str, Any],
    settings: dict[str, Any],
    two_prompts: Path,
    tmp_path: Path,
) -> None:
    """The second update, where the policy has left its reference; in two batches."""
    import torch
    from transformers import AutoModelForCausalLM, TrainerCallback

    config = kind(
        **{
            **settings,
            "weights": "full",
            "rollouts": 8,
            "batch_size": 4,
            "accumulation": 2,
            "max_steps": 2,
            "beta": 0.5,
            "gradient_clipping": None,
            **changes,
        }
    )
    reference: Any = AutoModelForCausalLM.from_pretrained(config.model)
    policy: Any = AutoModelForCausalLM.from_pretrained(config.model)
    found: dict[str, torch.Tensor] = {}

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            policy.load_state_dict(kwargs["model"].state_dict())

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found.update((n, p.grad.clone()) for n, p in kwargs["model"].named_parameters())

    trainer, script = scripted(config, two_prompts, tmp_path / "run")
    assert trainer.forward_pass.startswith("shared: each prompt once")
    trainer.add_callback(Watch())
    trainer.train()
    loss_by_hand(config, policy, reference, script).backward()
    charged = {n: p.grad.clone() for n, p in policy.named_parameters()}
    policy.zero_grad()
    # Without β it is another one, so what leaving the reference costs is in it.
    free = config.model_copy(update={"beta": 0.0})
    loss_by_hand(free, policy, reference, script).backward()
    difference = largest = 0.0
    for name, parameter in policy.named_parameters():
        assert torch.allclose(found[name], charged[name], rtol=1e-3, atol=1e-5), name
        difference = max(difference, float((charged[name] - parameter.grad).abs().max()))
        largest = max(largest, float(charged[name].abs().max()))
    assert difference > 0.01 * largest


def test_every_prompt_is_asked_once_before_any_is_asked_again() -> None:
    from training.group_trainers import Order

    config = RLOOConfig(
        model="m", samples=4, rollouts=16, batch_size=4, accumulation=2, passes=2, epochs=1
    )
    # Ten prompts, 40 answers, 16 at once: three times; each time 2 passes of 16/8 updates.
    assert config.steps(10) == 3 * 4
    places = list(Order(config, 10, config.steps(10)))
    # Each update takes two batches, and for every batch the same 16 places are drawn.
    assert len(places) == 3 * 8 * 16
    times = [places[start : start + 128] for start in range(0, 384, 128)]
    asked = []
    for time in times:
        assert time == time[:16] * 8
        groups = [time[start : start + 4] for start in range(0, 16, 4)]
        assert all(len(set(group)) == 1 for group in groups)
        asked += [group[0] for group in groups]
    assert sorted(asked[:10]) == list(range(10))
    assert len(asked) == 12


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (RLOOConfig, {"rollouts": 16, "samples": 3}, "rollouts 16 is not a multiple of samples 3"),
        (GRPOConfig, {"rollouts": 20, "samples": 4}, "20 is not a multiple of batch_size"),
        (GRPOConfig, {"samples": 1}, "greater than or equal to 2"),
        (GRPOConfig, {"lora": {"dropout": 0.1}}, "GRPO trains without dropout"),
        (RLOOConfig, {"early_stopping": {"metric": "loss"}}, "RLOO has no held-out loss"),
        (RLOOConfig, {"advantage_scale": "group"}, "'none' or 'batch'"),
        (GRPOConfig, {"loss": "bnpo"}, "'grpo', 'dr_grpo' or 'dapo'"),
        (RLOOConfig, {"loss": "grpo"}, "Extra inputs"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    kind: type[Any], changes: dict[str, Any], message: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError, match=message):
        kind(**{**settings, **changes})


def test_what_rewards_has_to_be_named_and_handed_in(
    settings: dict[str, Any], two_prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="reward_functions: red has to be named there and handed"):
        train(GRPOConfig(**settings), two_prompts, tmp_path / "a", progress=silent)
    none = RLOOConfig(**{**settings, "reward_functions": {}})
    with pytest.raises(InputError, match="nothing rewards the answers"):
        train(none, two_prompts, tmp_path / "b", progress=silent)
