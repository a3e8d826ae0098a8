"""Trainings that follow one another: which starts from which."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from preferences.tables import suggestion
from training import adapters
from training.pretraining import PretrainingConfig
from training.rewarded import RewardedConfig
from training.settings import TrainingConfig

ALIGNMENT = "alignment"
"""What the last training is called beside the steps."""


def named_trainings(
    steps: Mapping[str, TrainingConfig], alignment: TrainingConfig | None
) -> dict[str, TrainingConfig]:
    """Every training by its name, in their order."""
    return {**steps, **({ALIGNMENT: alignment} if alignment else {})}


def model_before(trainings: Mapping[str, TrainingConfig], name: str) -> tuple[str, str | None]:
    """The model that a training and those before it began with, and its revision."""
    config = trainings[name]
    while config.model != ALIGNMENT and config.model in trainings:
        config = trainings[config.model]
    return config.model, config.revision


def check_steps(steps: Mapping[str, TrainingConfig], alignment: TrainingConfig | None) -> None:
    """Raises ValueError where a training starts from what cannot be started from."""
    if steps and alignment is None:
        raise ValueError("steps: need `alignment`, which starts from them")
    if ALIGNMENT in steps:
        raise ValueError(
            f"steps.{ALIGNMENT}: that is the last training; give the step its own name"
        )
    earlier: dict[str, TrainingConfig] = {}
    used: set[str] = set()
    for name, config in named_trainings(steps, alignment).items():
        place = name if name == ALIGNMENT else f"steps.{name}"
        if isinstance(config, PretrainingConfig) and config.texts is None:
            raise ValueError(f"{place}.texts: missing; name the tables with texts to train on")
        if config.model in steps:
            _check_start(place, config, steps, earlier)
            used.add(config.model)
        if isinstance(config, RewardedConfig) and config.reward_model in steps:
            _check_reward_model(place, config, earlier)
            used.add(str(config.reward_model))
        earlier[name] = config
    for name in steps:
        if name not in used:
            raise ValueError(
                f"steps.{name}: nothing starts from it; name it as the `model` or `reward_model` "
                "of what comes after it, or leave it out"
            )


def _check_start(
    place: str,
    config: TrainingConfig,
    steps: Mapping[str, TrainingConfig],
    earlier: Mapping[str, TrainingConfig],
) -> None:
    name = config.model
    if name not in earlier:
        raise ValueError(f"{place}.model: {name!r} is no step before it; {_cure(name, earlier)}")
    if config.revision is not None:
        raise ValueError(f"{place}.revision: the step {name!r} has none; leave it out")
    if steps[name].method == "reward":
        raise ValueError(
            f"{place}.model: the step {name!r} trains a reward model, which gives no answers; "
            "start from a language model"
        )
    if steps[name].weights in adapters.NOT_MERGED:
        raise ValueError(
            f"{place}.model: the step {name!r} trains weights: {steps[name].weights}, which cannot "
            "be merged into a model to start from; say lora or full there"
        )


def _check_reward_model(
    place: str, config: RewardedConfig, earlier: Mapping[str, TrainingConfig]
) -> None:
    name = str(config.reward_model)
    if name not in earlier:
        raise ValueError(
            f"{place}.reward_model: {name!r} is no step before it; {_cure(name, earlier)}"
        )
    judge = earlier[name]
    if judge.method != "reward":
        raise ValueError(
            f"{place}.reward_model: the step {name!r} has method {judge.method}; name one with "
            "method: reward"
        )
    if judge.weights == "full":
        raise ValueError(
            f"{place}.reward_model: the step {name!r} trains full weights, and it is put "
            "beside the policy as an adapter; say weights: lora there"
        )
    if (judge.model, judge.revision) != (config.model, config.revision):
        raise ValueError(
            f"{place}.reward_model: the step {name!r} is trained on {_short(judge.model)} and this "
            f"on {_short(config.model)}, and an adapter fits its own base alone; train both on one"
        )


def _cure(name: str, earlier: Mapping[str, TrainingConfig]) -> str:
    if not earlier:
        return "steps are trained in the order they stand in"
    return suggestion(name, [*earlier])


def _short(model: str) -> str:
    """A model as people call it: of a folder the last part."""
    return Path(model).name if Path(model).is_dir() else model
