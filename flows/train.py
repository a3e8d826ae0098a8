"""The training stage: a dataset of the store in, an adapter or a model of the store out."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flows.judges import opened_judge
from flows.progress import Advance, Progress
from flows.recipe import Recipe
from generation.engine import EngineRuntime
from judging.judge import Group
from judging.pairwise import PairwiseJudge
from judging.verifier import load_check
from judging.win_rate import win_probabilities
from preferences.conversations import make_prompt
from preferences.errors import ServiceError
from preferences.fingerprint import fingerprint
from preferences.records import Candidate, Messages
from preferences.store import Artifact, Manifest, Shard, Store
from training.probe import Scorer


def train_model(
    recipe: Recipe, store: Store, dataset: Artifact, model: Artifact, progress: Progress
) -> None:
    """Train the recipe's model on a dataset of the store, unless it is done.

    Training runs in a process of its own, which gives its memory back when it ends.
    """
    if store.manifest(model) is not None:
        return
    with store.claim(str(model)) as ours, local_folder(store, dataset) as data:
        if not ours:
            raise ServiceError(f"{model}: another process trains this now; wait for it")
        with working_folder(store, model) as output:
            progress.say("  training")
            try:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    arguments = (recipe.model_dump_json(), str(data), str(output), store.url)
                    summary = pool.submit(_train, *arguments).result()
            except BrokenProcessPool as error:
                raise ServiceError(
                    "training was killed, often for want of memory; a rerun goes on from the last "
                    "checkpoint"
                ) from error
        finished = store.manifest(dataset)
        manifest = Manifest(
            stage=model.stage,
            fingerprint=model.fingerprint,
            name=f"{recipe.name} aligned",
            rows=finished.rows if finished else 0,
            dropped=0,
            parts=(summary["saved"],),
            inputs=(str(dataset),),
            config=recipe.model_dump(mode="json", include={"alignment"}),
            summary=summary,
        )
        store.finish(model, manifest)
        progress.finished(manifest)


@contextmanager
def local_folder(store: Store, artifact: Artifact) -> Iterator[Path]:
    """An artifact as a folder of this machine: itself, or a copy fetched from the bucket."""
    if store.is_local:
        yield Path(store.folder(artifact))
        return
    with TemporaryDirectory(prefix="pairwright-") as folder:
        store.fs.get(f"{store.folder(artifact)}/", folder + "/", recursive=True)
        yield Path(folder)


@contextmanager
def working_folder(store: Store, artifact: Artifact) -> Iterator[Path]:
    """A folder to write a model to; for a bucket, one that is sent there at the end."""
    if store.is_local:
        yield Path(store.folder(artifact))
        return
    with TemporaryDirectory(prefix="pairwright-") as folder:
        yield Path(folder)
        store.fs.put(folder + "/", f"{store.folder(artifact)}/", recursive=True)


def _train(recipe_json: str, dataset: str, output: str, store_url: str) -> dict[str, Any]:
    """In the child: train, then score the held-out pairs."""
    from training.dpo import train
    from training.evaluation import implicit_reward_accuracy

    recipe = Recipe.model_validate_json(recipe_json)
    config = recipe.alignment
    assert config is not None
    with ExitStack() as stack:
        scorer = well_formed = None
        if config.probe is not None:
            scorer = stack.enter_context(_scorer(recipe, Store(store_url)))
            well_formed = _well_formed(recipe)
        result = train(
            config, Path(dataset), Path(output), recipe.runtime.training, scorer, well_formed
        )
    accuracy = implicit_reward_accuracy(config, Path(output), Path(dataset))
    return {**dataclasses.asdict(result), "held_out": dataclasses.asdict(accuracy)}


@contextmanager
def _scorer(recipe: Recipe, store: Store) -> Iterator[Scorer | None]:
    """The recipe's judge, as training wants it: P(each answer beats the reference's)."""
    config = recipe.askable_judge()
    if config is None:
        yield None
        return
    if isinstance(config, PairwiseJudge) and config.engine == "vllm":
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


def _well_formed(recipe: Recipe) -> Callable[[Messages, str], bool] | None:
    """The evaluation's check named `well_formed`, which also watches over training."""
    checks = recipe.evaluation.checks if recipe.evaluation else {}
    if "well_formed" not in checks:
        return None
    check = load_check(checks["well_formed"])
    return lambda messages, answer: check(make_prompt(messages, "held-out prompt"), answer) >= 0.5
