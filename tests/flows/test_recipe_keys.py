"""No key of a recipe is read by nothing: each is taken from its config by the code that uses it."""

from __future__ import annotations

import inspect
import json
import math
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from pydantic import TypeAdapter

from flows import assembling, stages
from flows.chain import train_in_turn
from flows.evaluation import evaluate
from flows.labels import argilla_people
from flows.plan import make_plan, training_artifacts
from flows.progress import Progress
from flows.recipe import Recipe, load_recipe
from flows.rollouts import sampler
from flows.rounds import go_round, rounds_of
from flows.run import Run
from generation.engine import EngineConfig, EngineRuntime
from preferences.config import Config
from preferences.errors import InputError, ServiceError
from preferences.store import Artifact, Store
from tests.flows.test_recipe_judges import KINDS, judging, write_recipe
from tests.generation.endpoint import Answer, Endpoint, reply
from tests.generation.tiny_model import write_model, write_reward_model
from training import processes
from training.loop import train
from training.methods import Alignment
from training.processes import FSDPConfig
from training.rewarded import RewardedConfig
from training.run import TrainingRuntime
from training.settings import TrainingConfig
from training.texts import gather_texts

Key = tuple[type[Config], str]

# Identity and validation look at keys without using them.
ONLOOKERS = {"flows.plan", "flows.recipe", "generation.models"}
USERS = {"askable_judge", "prior_of"}


def all_keys(hint: Any = Recipe) -> set[Key]:
    """Every key that a recipe can hold, with the config that defines it."""
    found: set[Key] = set()
    if isinstance(hint, type) and get_origin(hint) is None and issubclass(hint, Config):
        for name, field in hint.model_fields.items():
            # A `kind` that has one value is read by pydantic, which picks the class by it.
            values = get_args(field.annotation)
            if get_origin(field.annotation) is not Literal or len(values) > 1:
                found.add((owner(hint, name), name))
            found |= all_keys(field.annotation)
    for part in get_args(hint):
        found |= all_keys(part)
    return found


def owner(config: type[Config], name: str) -> type[Config]:
    """The class that defines a field, of this one and its bases."""
    return next(c for c in config.__mro__ if name in inspect.get_annotations(c))


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> set[Key]:
    """The keys that were read while the test ran, but for those that onlookers read."""
    found: set[Key] = set()

    def get(self: Config, name: str) -> Any:
        fields = type(self).__pydantic_fields__
        code = sys._getframe(1)
        looks_on = code.f_globals["__name__"] in ONLOOKERS and code.f_code.co_name not in USERS
        validates = code.f_code.co_name in type(self).__pydantic_decorators__.model_validators
        if name in fields and not looks_on and not validates:
            found.add((owner(type(self), name), name))
        return object.__getattribute__(self, name)

    monkeypatch.setattr(Config, "__getattribute__", get, raising=False)
    return found


def carry_out(folder: Path, recipe: dict[str, Any]) -> Store:
    """All stages of a recipe in this process."""
    text = yaml.safe_dump(recipe)
    (folder / "recipe.yaml").write_text(text)
    plan = make_plan(load_recipe(folder / "recipe.yaml"))
    store = Store(folder / plan.recipe.runtime.store)
    run = Run(plan, store, Progress())
    stages.make_prompts(run)
    for number in range(len(plan.candidates)):
        stages.make_candidates(run, number)
    for number in range(len(plan.judgments)):
        stages.make_judgments(run, number)
    stages.make_answers(run)
    stages.make_routes(run)
    stages.ask_people(run)
    stages.make_rankings(run)
    assembling.make_preferences(run)
    assembling.make_dataset(run, text)
    trained = training_artifacts(plan.recipe, plan.dataset)
    for name in trained:
        train_in_turn(plan.recipe, store, plan.dataset, trained, name, run.progress)
    if plan.alignment is not None and plan.evaluation is not None:
        arguments = (plan.recipe, store, plan.dataset, plan.alignment, plan.evaluation)
        evaluate(*arguments, run.progress)
    return store


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def answered(body: dict[str, Any], number: int) -> Answer:
    """A verdict for the first where one is wanted, else a few words."""
    if not body.get("logprobs"):
        return reply(f"answer {number} of {body['messages'][-1]['content']}"[: 40 + number % 7])
    tokens = [
        {"token": token, "logprob": math.log(p), "bytes": None, "top_logprobs": []}
        for token, p in (("A", 0.8), ("B", 0.2))
    ]
    return reply("A", logprobs={"content": [{**tokens[0], "top_logprobs": tokens}]})


@pytest.mark.timeout(480)
def test_every_key_is_read_by_the_code_that_uses_it(
    tmp_path: Path, without_children: None, monkeypatch: pytest.MonkeyPatch, used: set[Key]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    model = str(write_model(tmp_path / "policy"))
    endpoint = Endpoint(answered)
    asking = {"base_url": endpoint.url, "price_per_million": [1.0, 1.0], "spending_limit": 5.0}
    write(tmp_path / "prompts.jsonl", [{"prompt": f"Say {n}, please."} for n in range(12)])
    write(tmp_path / "held.jsonl", [{"prompt": "Sing."}])
    write(tmp_path / "texts.jsonl", [{"body": f"The number {n}. " * 20} for n in range(9)])
    texts = {"new": ["texts.jsonl"], "old": ["texts.jsonl"], "column": "body", "held_out": 0.0}
    decontamination = {"against": ["held.jsonl"]}
    tiny = {"max_tokens": 4}
    # Of random weights nothing better can be asked.
    probe = {"every": 2, "prompts": 2, "max_malformed": 1, "max_length_rate": 1, **tiny}
    asked = {
        "name": "asked",
        "prompts": {"source": "prompts.jsonl", "decontamination": decontamination},
        "candidates": [
            {"kind": "sample", "name": "far", "engine": "openai", "model": "m", "samples": 2},
            {"kind": "sample", "name": "near", "engine": "transformers", "model": model}
            | {"samples": 1, "sampling": tiny},
        ],
        "judges": [
            {"kind": "pairwise", "name": "judge", "engine": "openai", "model": "m"},
            {"kind": "reward_model", "name": "scorer", "dtype": "float32"}
            | {"model": str(write_reward_model(tmp_path / "scorer"))},
            {"kind": "verifier", "name": "polite", "check": "regex", "pattern": "please"},
        ],
        "people": {"labels": "labels.csv", "budget": 4},
        "pairs": {"policy": "all_pairs", "min_probability": 0.5},
        "split": {"test": 0.3},
        "steps": {
            "field": {"method": "pretraining", "model": model, "texts": texts, "max_steps": 1}
            | {"weights": "lora", "dtype": "float32", "max_length": 32}
        },
        "alignment": {"method": "dpo", "model": "field", "epochs": 0.5, "dtype": "float32"}
        | {"batch_size": 2, "probe": probe},
        "evaluation": {"engine": "transformers", "judge": "scorer", "sampling": tiny}
        | {"kl_reference": {"model": model}},
        "rounds": {"most": 1, "max_kl": 99.0},
        "runtime": {"engines": {"far": asking, "judge": asking}, "store": str(tmp_path / "store")},
    }
    try:
        store = carry_out(tmp_path, asked)
    finally:
        endpoint.close()
    # A run of the recipe is its first round.
    loaded = load_recipe(tmp_path / "recipe.yaml")
    done, found = go_round(loaded, store, rounds_of(loaded, None), lambda path: False)
    assert (len(done), found.over) == (1, True)
    train_by_every_method(tmp_path / "trained", model, store)
    monkeypatch.setenv("ARGILLA_API_KEY", "none")
    ask_in_argilla(asked)

    pairs = [
        {"prompt": f"What is {n} and {n}?", "chosen": str(2 * n), "rejected": "I forgot."}
        for n in range(12)
    ]
    write(tmp_path / "pairs.jsonl", pairs)
    verdicts = [
        {"prompt": row["prompt"], "first": "good", "second": "bad", "probability": 2.0}
        | {"verdict": "first", "score_first": 1, "score_second": 0, "reply": "[[A]]"}
        for row in pairs
    ]
    write(tmp_path / "verdicts.jsonl", verdicts)
    responses = [
        {"prompt": row["prompt"], "model": model, "response": row[key], "response_id": f"{n}{key}"}
        for n, row in enumerate(pairs)
        for model, key in (("good", "chosen"), ("bad", "rejected"))
    ]
    write(tmp_path / "responses.jsonl", responses)
    likes = [{**row, "label": row["model"] == "good"} for row in responses]
    write(tmp_path / "likes.jsonl", likes)
    table = {"kind": "import", "source": "verdicts.jsonl"}
    imported = {
        "name": "imported",
        "candidates": [
            {"kind": "import", "name": "answers", "source": "responses.jsonl"},
            {"kind": "import", "name": "pairs", "source": "pairs.jsonl", "format": "preferences"},
        ],
        "judges": [
            {**table, "name": "words", "verdict_in": "verdict"},
            {**table, "name": "odds", "verdict_in": "probability", "probability_range": [0, 2]},
            {**table, "name": "marks", "verdict_in": "scores"},
            {**table, "name": "replies", "verdict_in": "reply"},
            {**table, "name": "likes", "source": "likes.jsonl", "format": "feedback"},
            {**table, "name": "pairs", "source": "pairs.jsonl", "format": "preferences"},
            {"kind": "prior", "name": "strength", "order": ["good", "bad"]},
        ],
        "pairs": {"policy": "delta", "models": ["good", "bad"]},
        "split": {"test": 0.3},
        "runtime": {"store": str(tmp_path / "store")},
    }
    carry_out(tmp_path, imported)
    ask_every_language_model_judge(tmp_path / "asking")
    start_of_vllm(model, monkeypatch)
    division_of_a_model()

    assert sorted(f"{c.__name__}.{name}" for c, name in all_keys() - used) == []


def train_by_every_method(folder: Path, model: str, store: Store) -> None:
    """A step of each, on the dataset that was made."""
    write(folder / "new.jsonl", [{"text": f"The number {n} comes next. " * 20} for n in range(9)])
    gather_texts([str(folder / "new.jsonl")], [str(folder / "new.jsonl")], folder / "texts")
    (pairs,) = store.manifests("dataset")
    dataset = Path(store.folder(Artifact("dataset", pairs.fingerprint)))
    tiny = {"model": model, "dtype": "float32", "probe": None, "max_steps": 1, "batch_size": 2}
    stop = {"early_stopping": {"metric": "loss", "patience": 1}}
    methods: list[dict[str, Any]] = [
        {"method": "dpo", "weights": "bottleneck", "labels": "soft", **stop},
        {"method": "sft", "weights": "prompt_tuning", "virtual_tokens": 2},
        {"method": "orpo"},
        {"method": "kto"},
        {"method": "reward"},
        {"method": "pretraining", "max_length": 32},
        {"method": "ranked_dpo"},
    ]
    answers = {"method": "ppo", "rollouts": 2, "max_tokens": 4}
    reward = {"reward_functions": {"f": "x:f"}}
    methods += [{**answers, **reward, "kl": {"kind": "adaptive"}}]
    methods += [{**answers, **reward, "method": name, "samples": 2} for name in ("rloo", "grpo")]
    for number, method in enumerate(methods):
        config: TrainingConfig = TypeAdapter(Alignment).validate_python({**tiny, **method})
        if isinstance(config, RewardedConfig):
            with sampler(config, EngineRuntime()) as sampling:
                functions = {"f": lambda messages, answer: -float(len(answer))}
                config = config.given(functions, sampling)
        data = folder / "texts" if config.method == "pretraining" else dataset
        train(config, data, folder / f"run-{number}")
    rewarded = {**tiny, **answers, "reward_model": str(folder / "run-4"), "reward_samples": 2}
    # A model of random weights never comes to an end.
    with pytest.raises(InputError, match="0 finished answers"):
        train(TypeAdapter(Alignment).validate_python(rewarded), dataset, folder / "rewarded")


def ask_in_argilla(recipe: dict[str, Any]) -> None:
    """What the server would be asked with; its own tests start one."""
    values = {**recipe, "people": {"labels": "argilla", "budget": 4}}
    loaded = Recipe.model_validate(values)
    with pytest.raises(ServiceError, match="no Argilla server"):
        argilla_people(loaded, Store("memory://keys"))
    assert loaded.people is not None
    assert loaded.people.overlap == 3


def ask_every_language_model_judge(folder: Path) -> None:
    """Judges that compare, reason, score and order."""
    folder.mkdir()
    endpoint = Endpoint(judging)
    try:
        carry_out(folder, yaml.safe_load(write_recipe(folder, endpoint.url, KINDS).read_text()))
    finally:
        endpoint.close()


def division_of_a_model() -> None:
    """Accelerate gets what the recipe says. Its processes have their own tests."""
    from transformers import TrainingArguments

    fsdp = FSDPConfig(reshard_after_forward=False, cpu_offload=True)
    told = processes.arguments(TrainingRuntime(processes=2, fsdp=fsdp))
    plugin = TrainingArguments(**told, use_cpu=True).fsdp_plugin_args
    assert plugin is not None
    assert plugin["fsdp_version"] == 2
    assert plugin["reshard_after_forward"] is False
    assert plugin["cpu_offload"] is True


class Started(Exception):
    """vLLM would start now."""


def start_of_vllm(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM gets what the recipe says. Its own tests start it; here that would only take time."""
    from generation.vllm_engine import _Server

    arguments: dict[str, Any] = {}

    def catch(**given: Any) -> None:
        arguments.update(given)
        raise Started

    monkeypatch.setattr("vllm.engine.arg_utils.EngineArgs", catch)
    config = EngineConfig(model=model, revision="v2", dtype="float32", max_length=99)
    runtime = EngineRuntime(tensor_parallel=2, memory_share=0.4, cpu_cache_gib=0.5)
    with pytest.raises(Started):
        _Server(config, runtime)
    assert arguments["model"] == model
    assert arguments["revision"] == "v2"
    assert arguments["dtype"] == "float32"
    assert arguments["max_model_len"] == 99
    assert arguments["tensor_parallel_size"] == 2
    assert arguments["gpu_memory_utilization"] == 0.4
    assert arguments["kv_cache_memory_bytes"] == 2**29
    assert arguments["trust_remote_code"] is False
