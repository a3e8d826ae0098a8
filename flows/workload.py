"""How much each stage of a recipe has to do, at most: calls, tokens, and the arithmetic of them.

It follows from the recipe, the models' configurations and the table of prompts alone. Answers are
taken to be as long as they may be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from flows.recipe import AskableJudge, JudgeConfig, Recipe
from flows.steps import ALIGNMENT
from generation.candidates import ImportedCandidates
from generation.engine import EngineConfig, EngineRuntime
from generation.prompts import PromptsConfig, read_prompts
from judging.listwise import ListwiseJudge
from judging.pairwise import ComparingJudge
from judging.pointwise import PointwiseJudge
from judging.reasoned import ReasonedPairwiseJudge
from judging.reward_model import RewardModelJudge
from preferences.tables import read_rows
from training.group_relative import GroupRelativeConfig
from training.memory import ANSWERS, Examples
from training.ppo import PPOConfig
from training.pretraining import PretrainingConfig
from training.rewarded import RewardedConfig
from training.settings import TrainingConfig

CHARACTERS = 4
"""Of a token, on average, in English; fewer in most other languages and in code."""
IMPORTED = 256
"""Tokens taken for an imported prompt and for an imported answer: they are not read here."""
TURN = 4
"""Tokens that a template has behind an answer, at most: the end of a turn and a line."""
RUBRIC = 300
"""Tokens that a judge's question has besides the prompt and the answers."""
TRAINING_SHARE = 0.4
"""Of a device's peak that training reaches (model FLOPs utilisation): large models on one card
reach 0.3 to 0.5, small ones and short rows less."""
READING_SHARE = 0.4
"""The same of reading prompts, many at once."""
WRITING_SHARE = 0.1
"""The same of writing answers, which waits for memory, with many requests at once."""
ADAPTIVE_CALLS = 2.0
"""Calls for each answer that an adaptive schedule asks: 11.9 for six (docs/judging.md)."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one stage does, at most."""

    name: str
    calls: int
    """Requests to a model; in training, sequences."""
    read: float
    """Tokens read; in training, tokens trained on, all passes together."""
    written: float
    """Tokens written."""
    flops: float
    """Floating-point operations done here; 0 where an endpoint does them."""
    peak_flops: float
    """Those a device at its peak would do in the same time: each by the share of it reached, and by
    the processes that do it together."""
    is_here: bool = True
    """Whether it runs here and not at an endpoint."""
    price: float | None = None
    """What the endpoint takes, where the recipe has its prices."""


def workload(recipe: Recipe) -> list[Work]:
    """The stages of a recipe that a model works in, in their order.

    Raises InputError where the prompts or a model's configuration cannot be read.
    """
    prompts, asked = _prompts(recipe)
    answers, longest = _answers(recipe)
    stages = []
    for source in recipe.candidates:
        if isinstance(source, ImportedCandidates):
            continue
        name, calls = f"candidates: {source.name}", prompts * source.samples
        runtime = recipe.runtime.engines.get(source.name)
        stages.append(_asking(name, source, runtime, calls, asked, source.sampling.max_tokens))
    for judge in recipe.judges:
        stages += _judging(recipe, judge, "judgments", prompts, answers, asked, longest)
    rows = round(prompts * (1 - recipe.split.test)) * _pairs(recipe, answers)
    together = recipe.runtime.training.processes
    for training, config in recipe.trainings.items():
        name = training if training == ALIGNMENT else f"steps: {training}"
        parameters = parameters_of(*recipe.model_before(training))
        if isinstance(config, PretrainingConfig):
            trained = [_pretraining(name, config, parameters)]
        else:
            shared = _shares(config, *recipe.model_before(training))
            each = examples_of(recipe, config).answers
            lists = round(prompts * (1 - recipe.split.test))
            number = lists if config.method == "ranked_dpo" else rows
            trained = _training(name, config, parameters, number, each, asked, longest, shared)
        learning = f"{name}: {config.method}"  # Probes are answered by each process.
        stages += [
            replace(work, peak_flops=work.peak_flops / together) if work.name == learning else work
            for work in trained
        ]
    if recipe.evaluation is not None:
        stages += _evaluation(recipe, prompts, asked)
    return stages


def examples_of(recipe: Recipe, config: TrainingConfig) -> Examples:
    """What is known of the examples that a training of the recipe will have."""
    answers, longest = _answers(recipe)
    number = answers if config.method == "ranked_dpo" else ANSWERS.get(config.method, 1)
    if any(isinstance(source, ImportedCandidates) for source in recipe.candidates):
        return Examples(number)
    return Examples(number, longest + TURN)


def _answers(recipe: Recipe) -> tuple[int, int]:
    """How many answers each prompt has, and the most tokens of one."""
    answers = longest = 0
    for source in recipe.candidates:
        if isinstance(source, ImportedCandidates):
            answers += 1 if source.format == "responses" else 2
            longest = max(longest, IMPORTED)
        else:
            answers += source.samples
            longest = max(longest, source.sampling.max_tokens)
    return answers, longest


def training_flops(config: TrainingConfig, parameters: int, tokens: float) -> float:
    """Of so many tokens trained on: 2 a parameter forward, and 2 or, with full weights, 4 backward.

    Gradients of frozen weights are not made; those of what they multiply are. With gradient
    checkpointing every layer runs forward once more: 8 in place of 6. A reference pass is 2.
    """
    passes = 6 if config.weights == "full" else 4
    passes += 2 if config.gradient_checkpointing else 0
    passes += 2 if config.method in ("dpo", "kto") else 0
    return passes * parameters * tokens


def _prompts(recipe: Recipe) -> tuple[int, float]:
    """How many prompts there are, and their tokens on average."""
    if recipe.prompts is not None:
        return _counted(recipe.prompts)
    imports = [c for c in recipe.candidates if isinstance(c, ImportedCandidates)]
    return sum(1 for c in imports for _ in read_rows(c.source, c.split)), IMPORTED


def _counted(config: PromptsConfig) -> tuple[int, float]:
    lengths = [sum(len(m.content) for m in prompt.messages) for prompt in read_prompts(config)]
    return len(lengths), sum(lengths) / CHARACTERS / max(len(lengths), 1)


def _pairs(recipe: Recipe, answers: int) -> int:
    """Pairs of a prompt, at most."""
    every = recipe.pairs.policy in ("all_pairs", "delta")
    return max(answers * (answers - 1) // 2, 1) if every else 1


def _judging(
    recipe: Recipe,
    judge: JudgeConfig,
    stage: str,
    prompts: int,
    answers: int,
    asked: float,
    longest: float,
) -> list[Work]:
    name = f"{stage}: {judge.name}"
    runtime = recipe.runtime.engines.get(judge.name)
    question = RUBRIC + asked
    match judge:
        case ComparingJudge():
            calls, written = math.ceil(prompts * _comparisons(judge.schedule, answers)), 1
            if isinstance(judge, ReasonedPairwiseJudge):
                calls, written = calls * judge.samples, judge.max_tokens
            return [_asking(name, judge, runtime, calls, question + 2 * longest, written)]
        case PointwiseJudge():
            calls = prompts * answers * len(judge.criteria)
            return [_asking(name, judge, runtime, calls, question + longest, 1)]
        case ListwiseJudge():
            calls, read = prompts * judge.rounds, question + answers * longest
            return [_asking(name, judge, runtime, calls, read, 2 * answers)]
        case RewardModelJudge():
            calls = prompts * answers
            scorer = EngineConfig(model=judge.model, revision=judge.revision)
            return [_asking(name, scorer, runtime, calls, asked + longest, 0)]
    return []  # checks, orders and judgments that are there already cost nothing to speak of


def _comparisons(schedule: str, answers: int) -> float:
    """Of one prompt's answers."""
    if answers < 3 or schedule == "all_pairs":
        return answers * (answers - 1)
    return 2 * (answers - 1) if schedule == "knockout" else ADAPTIVE_CALLS * answers


def _pretraining(name: str, config: PretrainingConfig, parameters: int) -> Work:
    assert config.texts is not None
    rows = (row for table in config.texts.new for _, row in read_rows(table))
    characters = sum(len(str(row.get(config.texts.column) or "")) for row in rows)
    blocks = characters / CHARACTERS / config.max_length / (1 - config.replay)
    steps = config.max_steps or math.ceil(blocks / config.update * (config.epochs or 1))
    tokens = float(steps * config.update * config.max_length)
    flops = training_flops(config, parameters, tokens)
    title = f"{name}: pretraining"
    return Work(title, steps * config.update, tokens, 0.0, flops, flops / TRAINING_SHARE)


def _shares(config: TrainingConfig, model: str, revision: str | None) -> bool:
    """Whether a prompt with several answers is computed once."""
    from training.passes import shares

    return shares(config, described(model, revision)[0])


def _training(
    name: str,
    config: TrainingConfig,
    parameters: int,
    rows: int,
    answers: int,
    asked: float,
    longest: float,
    shared: bool,
) -> list[Work]:
    steps = config.max_steps or math.ceil(math.ceil(rows / config.update) * (config.epochs or 1))
    sequences = steps * config.update * answers
    stages = []
    sampled = readers = 0
    if isinstance(config, PPOConfig):
        # A step is all the passes over what is sampled at once; policy, reference and reward model
        # read it before.
        steps = config.max_steps or math.ceil(rows / config.rollouts * (config.epochs or 1))
        sampled, readers = steps * config.rollouts, 3
        sequences = sampled * config.passes
    elif isinstance(config, GroupRelativeConfig):
        steps = config.steps(rows)
        sampled = math.ceil(steps / config.updates) * config.rollouts
        again = config.method == "rloo" or config.updates > 1
        readers = (config.beta > 0) + (config.reward_model is not None) + again
        sequences = steps * config.update
    if isinstance(config, RewardedConfig):
        longest = float(config.max_tokens)
        stages.append(_here(f"{name}: rollouts", parameters, sampled, asked, config.max_tokens))
    length = min(asked + longest, config.max_length)
    tokens = sequences * length
    if shared:
        tokens -= (sequences - sequences // answers) * max(length - longest, 0.0)
    flops = training_flops(config, parameters, tokens) + 2 * parameters * readers * sampled * length
    title = f"{name}: {config.method}"
    stages.append(Work(title, sequences, tokens, 0.0, flops, flops / TRAINING_SHARE))
    if config.probe is not None:
        probes = math.ceil(steps / config.probe.every) + 1
        calls = probes * config.probe.prompts
        written = config.probe.max_tokens
        stages.append(_here(f"{name}: probes", parameters, calls, asked, written))
    return stages


def _evaluation(recipe: Recipe, prompts: int, asked: float) -> list[Work]:
    config = recipe.evaluation
    assert config is not None
    count = round(prompts * recipe.split.test)
    if config.prompts is not None:
        count, asked = _counted(config.prompts)
    groups, longest = count * config.samples, config.sampling.max_tokens
    parameters = parameters_of(*recipe.model_before())
    stages = [_here("evaluation: answers", parameters, 2 * groups, asked, longest)]
    if config.measures_kl:
        read = groups * (asked + longest)
        flops = 2 * 2 * parameters * read  # The policy and the reference read each answer.
        stages.append(Work("evaluation: KL", groups, 2 * read, 0.0, flops, flops / READING_SHARE))
    judge: AskableJudge | None = recipe.askable_judge()
    if judge is not None:
        stages += _judging(recipe, judge, "evaluation", groups, 2, asked, longest)
    return stages


def _asking(
    name: str,
    config: EngineConfig,
    runtime: EngineRuntime | None,
    calls: int,
    read: float,
    written: float,
) -> Work:
    """So many requests to a language model, each of so many tokens."""
    if config.engine != "openai":
        parameters = parameters_of(config.model, config.revision)
        return _here(name, parameters, calls, read, written)
    work = Work(name, calls, calls * read, calls * written, 0.0, 0.0, is_here=False)
    if runtime is None or runtime.price_per_million is None:
        return work
    of_read, of_written = runtime.price_per_million
    return replace(work, price=(work.read * of_read + work.written * of_written) / 1e6)


def _here(name: str, parameters: int, calls: int, read: float, written: float) -> Work:
    reading, writing = 2 * parameters * calls * read, 2 * parameters * calls * written
    peak = reading / READING_SHARE + writing / WRITING_SHARE
    return Work(name, calls, calls * read, calls * written, reading + writing, peak)


@lru_cache
def parameters_of(model: str, revision: str | None) -> int:
    """Parameters that a token of this model passes through."""
    active: int = described(model, revision)[1].active
    return active


@lru_cache
def described(model: str, revision: str | None) -> tuple[Any, Any]:
    """A model's configuration and its shape."""
    from training.shape import model_config, shape_of

    config = model_config(model, revision)
    return config, shape_of(config)
