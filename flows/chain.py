"""A recipe's trainings one after the other: where each starts, and the whole model it hands on.

    merged/<fingerprint>/    the model of the training with this fingerprint, merged with its base

With a bucket as store, merged models lie in the cache of the machine that needs them. They are made
of what is in the store, so they can be deleted and are made anew.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from flows.children import in_child
from flows.progress import Progress
from flows.recipe import Recipe
from flows.steps import ALIGNMENT
from flows.train import Training, cache, local_folder, train_model
from preferences.fingerprint import fingerprint
from preferences.store import Artifact, Store
from training.merge import merge
from training.models import Dtype, saved_folder
from training.rewarded import RewardedConfig

Trained = Mapping[str, Artifact]
"""What `flows.plan.training_artifacts` names: the models of a recipe by their trainings' names."""


def train_in_turn(
    recipe: Recipe, store: Store, dataset: Artifact, trained: Trained, name: str, progress: Progress
) -> None:
    """Train one of a recipe's models, unless it is done; those it starts from have to be."""
    train_model(
        recipe,
        store,
        dataset,
        trained[name],
        progress,
        lambda: located(recipe, store, trained, name),
    )


def located(recipe: Recipe, store: Store, trained: Trained, name: str = ALIGNMENT) -> Training:
    """A training with folders of this machine in the place of the steps it starts from."""
    config, changes, starts = recipe.trainings[name], {}, []
    if config.model in recipe.steps:
        starts.append(trained[config.model])
        changes["model"] = str(handed_on(recipe, store, trained, config.model))
    if isinstance(config, RewardedConfig) and config.reward_model in recipe.steps:
        starts.append(trained[config.reward_model])
        changes["reward_model"] = str(_fetched(store, trained[config.reward_model]))
    return Training(name, config.model_copy(update=changes), tuple(starts))


def handed_on(recipe: Recipe, store: Store, trained: Trained, name: str = ALIGNMENT) -> Path:
    """The model of a finished training as one whole folder of this machine, made if it is not
    there."""
    artifact, config = trained[name], recipe.trainings[name]
    saved = saved_folder(config.weights)
    if config.weights == "full" and store.is_local:
        return Path(store.folder(artifact)) / saved
    place = machine_folder(store) / "merged" / artifact.fingerprint
    if not place.exists():
        config = located(recipe, store, trained, name).config
        with local_folder(store, artifact) as folder:
            arguments = (config.model, config.revision, folder / saved, place, config.dtype)
            in_child("merging", _merge, *arguments, f"Merged from {artifact}.\n")
    return place


def machine_folder(store: Store) -> Path:
    """Where this machine keeps what is made of a store's artifacts: the store itself, if it is a
    folder."""
    return Path(store.root) if store.is_local else cache() / "stores" / fingerprint(store.url)


def _merge(
    model: str, revision: str | None, trained: Path, place: Path, dtype: Dtype, card: str
) -> None:
    merge(model, trained, place, dtype, card=card, revision=revision)


def _fetched(store: Store, artifact: Artifact) -> Path:
    """An artifact as a folder that stays on this machine."""
    if store.is_local:
        return Path(store.folder(artifact))
    place = machine_folder(store) / str(artifact)
    if not place.exists():
        part = place.with_name(f"{place.name}.{os.getpid()}.part")
        with local_folder(store, artifact) as folder:
            shutil.copytree(folder, part)
        part.rename(place)
    return place
