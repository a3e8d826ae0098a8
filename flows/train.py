"""The training stage: a dataset of the store in, an adapter or a model of the store out."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from flows.children import in_child, in_children
from flows.judges import opened_judge
from flows.plan import WELL_FORMED
from flows.progress import Advance, Progress
from flows.recipe import Recipe
from flows.rollouts import BESIDE_TRAINING, sampler
from flows.steps import ALIGNMENT
from generation.engine import EngineConfig, EngineRuntime
from judging.judge import Group
from judging.verifier import load_check
from judging.win_rate import win_probabilities
from preferences.conversations import make_prompt
from preferences.errors import ServiceError
from preferences.fingerprint import fingerprint
from preferences.records import Candidate, Messages
from preferences.store import Artifact, DiskFull, Manifest, Shard, Store
from training.pretraining import PretrainingConfig, TextsConfig, gathered
from training.probe import Scorer
from training.rewarded import RewardedConfig
from training.rollouts import RewardFunction
from training.settings import TrainingConfig

Result = TypeVar("Result")

WAIT_SECONDS = 5.0
"""Between two looks at whether the process that trains the same model is done."""


@dataclass(frozen=True)
class Training:
    """One of a recipe's trainings, as it is carried out."""

    name: str
    config: TrainingConfig
    """With folders in the place of the steps that it starts from."""
    starts: tuple[Artifact, ...] = ()
    """Those steps."""


def train_model(
    recipe: Recipe,
    store: Store,
    dataset: Artifact,
    model: Artifact,
    progress: Progress,
    training: Callable[[], Training] | None = None,
) -> None:
    """Train a model of the recipe on a dataset of the store, by default its alignment, unless it is
    done.

    `training` is asked once it is clear that there is something to do. Training runs in a process
    of its own, which gives its memory back when it ends. Where another process trains the same
    model, its end is waited for.
    """
    waiting = False
    while store.manifest(model) is None:
        with store.claim(str(model)) as ours:
            if ours and store.manifest(model) is None:
                todo = training() if training else Training(ALIGNMENT, recipe.trainings[ALIGNMENT])
                _train_claimed(recipe, store, dataset, model, progress, todo)
        if not ours:
            if not waiting:
                progress.say("  another process trains this; waiting for it")
            waiting = True
            time.sleep(WAIT_SECONDS)


def _train_claimed(
    recipe: Recipe,
    store: Store,
    dataset: Artifact,
    model: Artifact,
    progress: Progress,
    training: Training,
) -> None:
    config = training.config
    with (
        _training_data(store, dataset, config) as data,
        working_folder(store, model) as output,
    ):
        progress.say("  training" if training.name == ALIGNMENT else f"  training {training.name}")
        alone = config.model_copy(update={"texts": None}) if _texts(config) else config
        told = (recipe.model_dump_json(), alone.model_dump_json())
        places = (str(data), str(output), store.url)
        processes = recipe.runtime.training.processes
        summary = (
            in_child("training", _train, *told, *places)
            if processes == 1
            else in_children("training", processes, _train, *told, *places)
        )
        if not store.is_local:
            send(output, store, model)
        finished = store.manifest(dataset)
        manifest = Manifest(
            stage=model.stage,
            fingerprint=model.fingerprint,
            name=f"{recipe.name} {'aligned' if training.name == ALIGNMENT else training.name}",
            rows=finished.rows if finished and not _texts(config) else summary["train"]["rows"],
            dropped=0,
            parts=(summary["saved"],),
            inputs=(*(() if _texts(config) else (str(dataset),)), *map(str, training.starts)),
            config={ALIGNMENT: recipe.trainings[training.name].model_dump(mode="json")},
            summary=summary,
        )
        store.finish(model, manifest)
        progress.finished(manifest)


def _texts(config: TrainingConfig) -> TextsConfig | None:
    """The texts that a pre-training has in place of the dataset."""
    return config.texts if isinstance(config, PretrainingConfig) else None


@contextmanager
def _training_data(store: Store, dataset: Artifact, config: TrainingConfig) -> Iterator[Path]:
    texts = _texts(config)
    with gathered(texts) if texts else local_folder(store, dataset) as folder:
        yield folder


@contextmanager
def local_folder(store: Store, artifact: Artifact) -> Iterator[Path]:
    """An artifact as a folder of this machine: itself, or a copy fetched from the bucket."""
    if store.is_local:
        yield Path(store.folder(artifact))
        return
    with TemporaryDirectory(prefix="pairwright-") as folder:
        # One by one: what a slash at the end of a folder means differs between file systems.
        for path in store.fs.find(store.folder(artifact)):
            target = Path(folder) / path.removeprefix(store.folder(artifact)).lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            store.fs.get_file(path, str(target))
        yield Path(folder)


@contextmanager
def working_folder(store: Store, artifact: Artifact) -> Iterator[Path]:
    """A folder to write a model to.

    For a bucket it is one of this machine, in the user's cache. It goes away when the block ends
    well; otherwise it stays, and a rerun here goes on from its last checkpoint.
    """
    if store.is_local:
        yield Path(store.folder(artifact))
        return
    folder = cache() / "training" / fingerprint([store.url, str(artifact)])
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    shutil.rmtree(folder)


def cache() -> Path:
    """Where this machine keeps what belongs to stores that are buckets."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "pairwright"


def send(folder: Path, store: Store, artifact: Artifact) -> None:
    """Copy a finished run to its place in the bucket; ServiceError if that breaks off."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"):
        place = f"{store.folder(artifact)}/{path.relative_to(folder).as_posix()}"
        try:
            store.fs.makedirs(place.rpartition("/")[0], exist_ok=True)
            store.fs.put_file(str(path), place)
        except OSError as error:
            raise ServiceError(
                f"{store.url}: the trained model could not be sent there ({error}); run the same "
                "again, which trains nothing and sends it"
            ) from error


def _train(
    recipe_json: str, config_json: str, dataset: str, output: str, store_url: str
) -> dict[str, Any]:
    """In the child, or in each of several: train; in the first, then score the held-out pairs."""
    from pydantic import TypeAdapter

    from training.loop import train
    from training.methods import Alignment, method_of
    from training.processes import is_main

    recipe = Recipe.model_validate_json(recipe_json)
    config: TrainingConfig = TypeAdapter(Alignment).validate_json(config_json)
    with _full_disk_explained(Path(output)), ExitStack() as stack:
        scorer = well_formed = None
        if config.probe is not None:
            scorer = stack.enter_context(_scorer(recipe, Store(store_url)))
            well_formed = _well_formed(recipe)
        if isinstance(config, RewardedConfig):
            sampling = sampler(config, recipe.runtime.engines.get("policy", BESIDE_TRAINING))
            config = config.given(_reward_functions(config), stack.enter_context(sampling))
        result = train(
            config, Path(dataset), Path(output), recipe.runtime.training, scorer, well_formed
        )
    if not is_main():
        return {}
    found = method_of(config).evaluate(config, Path(output), Path(dataset))
    return {**dataclasses.asdict(result), "held_out": dataclasses.asdict(found)}


@contextmanager
def _full_disk_explained(output: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # safetensors tells it in words; torch's writer only finds itself at another place than it
        # should be.
        words = str(error)
        told = "No space left on device" in words or "inline_container" in words
        if not told and getattr(error, "errno", None) != errno.ENOSPC:
            raise
        raise DiskFull(
            f"{output}: no space left on the disk; free some and run the same again, training goes "
            "on from its last checkpoint"
        ) from error


@contextmanager
def _scorer(recipe: Recipe, store: Store) -> Iterator[Scorer | None]:
    """The recipe's judge, as training wants it: P(each answer beats the reference's)."""
    config = recipe.askable_judge()
    if config is None:
        yield None
        return
    if isinstance(config, EngineConfig) and config.engine == "vllm":
        # vLLM reserves a device's memory as a whole; here the judge shares it with the trainer.
        config = config.model_copy(update={"engine": "transformers"})
    runtime = recipe.runtime.engines.get(config.name, EngineRuntime())
    everything = Shard(0, 1)
    with opened_judge(config, runtime, store, Advance(0, "judgments")) as judge_for:

        def score(
            prompts: Sequence[Messages], responses: Sequence[str], references: Sequence[str]
        ) -> list[float | None]:
            groups = [
                _pair(messages, response, reference)
                for messages, response, reference in zip(
                    prompts, responses, references, strict=True
                )
            ]
            # An empty answer says nothing that could be judged; it loses to one that does.
            told = [g for g in groups if all(c.response.strip() for c in g.candidates)]
            with judge_for(everything) as ask:
                found = dict(zip(map(id, told), win_probabilities(told, ask(told)), strict=True))
            return [found.get(id(g), _by_emptiness(g)) for g in groups]

        yield score


def _pair(messages: Messages, response: str, reference: str) -> Group:
    prompt = make_prompt(messages, "held-out prompt")
    ours, theirs = (
        Candidate(f"{who} {fingerprint(text)}", prompt.prompt_id, who, text, "complete")
        for who, text in (("policy", response), ("reference", reference))
    )
    return Group(prompt, (ours, theirs))


def _by_emptiness(group: Group) -> float | None:
    ours, theirs = (bool(c.response.strip()) for c in group.candidates)
    return None if ours == theirs else float(ours)


def _reward_functions(config: RewardedConfig) -> dict[str, RewardFunction]:
    """The functions that a configuration names, which score as an evaluation's checks do."""

    def function(place: str) -> RewardFunction:
        check = load_check(place)
        return lambda messages, answer: float(check(make_prompt(messages, "prompt"), answer))

    return {name: function(place) for name, place in config.reward_functions.items()}


def _well_formed(recipe: Recipe) -> Callable[[Messages, str], bool] | None:
    """The evaluation's check named `well_formed`, which also watches over training."""
    checks = recipe.evaluation.checks if recipe.evaluation else {}
    if WELL_FORMED not in checks:
        return None
    check = load_check(checks[WELL_FORMED])
    return lambda messages, answer: check(make_prompt(messages, "held-out prompt"), answer) >= 0.5
