"""The miniature as a laboratory: datasets of its recipe, and what a policy is worth.

A policy's worth is the true reward, and how far it went is its KL from the first policy. Both are
measured on answers that it samples at temperature 1 to prompts which nothing was trained on.
"""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flows.plan import make_plan
from flows.recipe import load_recipe
from judging.verifier import load_check
from preferences.conversations import make_prompt
from preferences.estimate import Estimate, clustered_mean
from preferences.records import Prompt
from preferences.store import Store
from training import models
from training.data import HeldOutPrompt, held_out_prompt
from training.evaluation import answer_log_probs
from training.rollouts import sample_answers
from training.saved_adapters import load_trained
from training.settings import TrainingConfig

FOLDER = Path(__file__).parent.parent / "recipes" / "miniature"
POLICY, JUDGE = FOLDER / "policy", FOLDER / "judge"
SAMPLES = 2
"""Answers to each held-out prompt."""
MAX_TOKENS = 64
BATCH = 256

true_reward = load_check(f"{FOLDER / 'world.py'}:reward")
_form = load_check(f"{FOLDER / 'world.py'}:well_formed")


def build(work: Path, name: str, prompts: int, policy: Path = POLICY) -> Path:
    """The miniature recipe's dataset on prompts drawn at random, its answers sampled from `policy`;
    built by `pairwright build` into a store in `work`, once."""
    lines = (FOLDER / "prompts.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    drawn = work / f"prompts-{prompts}.jsonl"
    drawn.write_text("".join(random.Random(0).sample(lines, prompts)), encoding="utf-8")
    raw = yaml.safe_load((FOLDER / "recipe.yaml").read_text(encoding="utf-8"))
    raw = {k: v for k, v in raw.items() if k not in ("alignment", "evaluation")}
    raw["name"] = name
    raw["prompts"] |= {"source": str(drawn), "limit": None}
    raw["candidates"][0]["model"] = str(policy)
    raw["judges"][0] |= {"model": str(JUDGE), "rubric": str(FOLDER / "rubric.md")}
    recipe, store = work / f"{name}.yaml", Store(str(work / "store"))
    recipe.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    command = [str(Path(sys.executable).with_name("pairwright")), "build", str(recipe)]
    subprocess.run([*command, "--store", store.url, "--no-report"], check=True)
    return Path(store.folder(make_plan(load_recipe(recipe)).dataset))


@dataclass(frozen=True)
class Asked:
    """A held-out prompt."""

    task: str
    """Action and object: six prompts ask the same in other words, and are not independent."""
    prompt: Prompt
    tokens: HeldOutPrompt


@dataclass(frozen=True)
class Said:
    """An answer to a held-out prompt."""

    asked: Asked
    ids: list[int]
    """Its tokens, with the one that ends it."""
    text: str
    reward: float
    """The true one, between 0 and 1."""


@dataclass(frozen=True)
class Measured:
    """Answers of a policy, in one order of prompts for all policies."""

    tasks: tuple[str, ...]
    rewards: tuple[float, ...]
    kl: tuple[float, ...]
    """log π − log π_0 of each answer, in nats; their mean estimates KL(π‖π_0)."""
    malformed: float
    """Share of the answers that are no sentence of the grammar."""

    @property
    def reward(self) -> Estimate:
        """The mean true reward."""
        return mean(self.tasks, self.rewards)

    @property
    def distance(self) -> Estimate:
        """KL from the first policy, in nats an answer."""
        return mean(self.tasks, self.kl)

    def gain(self, start: Measured) -> Estimate:
        """By how much the true reward is higher than another policy's, paired by prompt."""
        pairs = zip(self.rewards, start.rewards, strict=True)
        return mean(self.tasks, [after - before for after, before in pairs])


def held_out(path: Path = FOLDER / "test_prompts.jsonl") -> list[Asked]:
    """The prompts of a file, tokenized."""
    tokenizer = models.load_tokenizer(str(POLICY), None)
    asked = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        messages = [{"role": "user", "content": row["prompt"]}]
        task = row["id"].rpartition("-")[0]
        tokens = held_out_prompt(row["id"], messages, tokenizer)
        asked.append(Asked(task, make_prompt(tokens.messages, row["id"]), tokens))
    return asked


def load_policy(model: str, saved: Path | None = None) -> Any:
    """A model, with what a run on it saved."""
    if saved is not None and saved.name == "model":
        model, saved = str(saved), None
    with models.quiet_libraries():
        loaded = models.load_model(model, None, "lora", "float32")
        return (load_trained(loaded, saved) if saved else loaded).eval()


def trained_policy(config: TrainingConfig, output: Path) -> Any:
    """What a run left in its folder."""
    return load_policy(config.model, output / models.saved_folder(config.weights))


def say(policy: Any, asked: Sequence[Asked], samples: int, seed: int = 0) -> list[Said]:
    """So many answers of a policy to each prompt, at temperature 1, prompt by prompt."""
    tokenizer = models.load_tokenizer(str(POLICY), None)
    several = list(itertools.chain.from_iterable([one] * samples for one in asked))
    answers = sample_answers(
        policy,
        [one.tokens.ids for one in several],
        ends=models.end_tokens(str(POLICY), None, tokenizer),
        pad=tokenizer.pad_token_id,
        temperature=1.0,
        max_tokens=MAX_TOKENS,
        seed=seed,
        batch_size=BATCH,
        bf16=False,
    )
    texts = [tokenizer.decode(a.ids, skip_special_tokens=True) for a in answers]
    return [
        Said(one, list(a.ids), text, float(true_reward(one.prompt, text)))
        for one, a, text in zip(several, answers, texts, strict=True)
    ]


def log_probs(policy: Any, said: Sequence[Said]) -> list[float]:
    """log π of each answer, in nats."""
    pad = models.load_tokenizer(str(POLICY), None).pad_token_id
    rows = [(list(one.asked.tokens.ids), one.ids) for one in said]
    return answer_log_probs(policy, rows, pad, BATCH)


def measure(policy: Any, first: Any, asked: Sequence[Asked]) -> Measured:
    """What a policy is worth, from `SAMPLES` answers to each prompt."""
    said = say(policy, asked, SAMPLES)
    ours, theirs = log_probs(policy, said), log_probs(first, said)
    return Measured(
        tasks=tuple(one.asked.task for one in said),
        rewards=tuple(one.reward for one in said),
        kl=tuple(a - b for a, b in zip(ours, theirs, strict=True)),
        malformed=sum(not _form(one.asked.prompt, one.text) for one in said) / len(said),
    )


def mean(tasks: Sequence[str], values: Sequence[float]) -> Estimate:
    """With an interval that takes only different tasks for independent."""
    found = clustered_mean(zip(tasks, values, strict=True))
    assert found is not None
    return found
