"""Rounds of alignment: a recipe again with the policy that it trained, as long as that is a gain.

A round is an ordinary recipe, so status, report and trace know it. It is written beside what it
makes; what rounds have in common, as the first of them and a run of the recipe, is made once.

    rounds/<fingerprint of the first round's evaluation>/round-2.yaml
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.chain import handed_on, machine_folder
from flows.comparison import interval
from flows.labels import plan_with_answers
from flows.measuring import KLReference, RoundsConfig
from flows.plan import make_plan, training_artifacts
from flows.recipe import Recipe, load_recipe, recipe_text
from flows.steps import ALIGNMENT
from generation.candidates import SampledCandidates
from preferences.errors import InputError
from preferences.judge_tables import NamedTable
from preferences.store import Store
from training.adapters import NOT_MERGED
from training.rewarded import RewardedConfig

CarryOut = Callable[[Path], bool]
"""Builds, trains and evaluates a recipe; whether it came to its end and does not wait."""


@dataclass(frozen=True)
class Round:
    """A round that is finished. Estimates are as in an evaluation's manifest."""

    number: int
    recipe: str
    """Its file."""
    dataset: str
    model: str
    """Artifacts of its store."""
    pairs: int
    win_rate: Mapping[str, float] | None
    """Against its own start; None where nothing could be judged."""
    kl: Mapping[str, float] | None
    """From the first round's start, in nats an answer."""
    checks: Mapping[str, Sequence[Mapping[str, float] | None]]
    """Each check's mean before and after."""

    @property
    def is_gain(self) -> bool:
        """Whether it beats its own start with 95 % confidence."""
        return self.win_rate is not None and self.win_rate["low"] > 0.5


@dataclass(frozen=True)
class Verdict:
    """What follows from the rounds so far."""

    kept: int
    """The round whose policy is the best there is; 0 is the one they all began with."""
    over: bool
    reason: str
    """Why, in sentences."""


def verdict(rounds: Sequence[Round], config: RoundsConfig) -> Verdict:
    """Which round to keep, and whether to go on: not after too far a round, not after as many
    without a gain as there is patience for, and not beyond the most."""
    kept = lost = 0
    told = ["Nothing is better yet than what the rounds began with."]
    for found in rounds:
        if config.max_kl is not None and found.kl and found.kl["mean"] > config.max_kl:
            told.append(
                f"Round {found.number} is {found.kl['mean']:.2f} nats from the first policy, which "
                f"passes max_kl {config.max_kl:g}."
            )
            return Verdict(kept, True, " ".join(told))
        if found.is_gain:
            kept, lost = found.number, 0
            told = [f"Round {kept} is kept: it wins {interval(found.win_rate)} against its start."]
        else:
            lost += 1
            won = interval(found.win_rate) or "nothing that could be judged"
            told.append(f"Round {found.number} is no gain: it wins {won}.")
        if lost == config.patience:
            return Verdict(kept, True, " ".join(told))
    if len(rounds) >= config.most:
        told.append(f"There are {config.most} rounds at most.")
    return Verdict(kept, len(rounds) >= config.most, " ".join(told))


def go_round(
    recipe: Recipe, store: Store, config: RoundsConfig, carry_out: CarryOut
) -> tuple[list[Round], Verdict]:
    """Have every round carried out that is not finished; the rounds, and what follows from them.

    Ends early where `carry_out` says that it waits.
    """
    done: list[Round] = []
    first = _fingerprint(recipe)
    while True:
        found = verdict(done, config)
        if found.over:
            return done, found
        number = len(done) + 1
        start = None if found.kept == 0 else policy_of(Path(done[found.kept - 1].recipe), store)
        text = recipe_text(round_recipe(recipe, number, start), store.url)
        path = _written(store, first, number, text)
        finished = _finished(path, number, store)
        if finished is None:
            finished = _finished(path, number, store) if carry_out(path) else None
        if finished is None:
            return done, found
        done.append(finished)


def next_round(recipe: Recipe, store: Store) -> Path | None:
    """The recipe of the round that is not finished; None after the last."""
    owed: list[Path] = []

    def carry_out(path: Path) -> bool:
        owed.append(path)
        return False

    go_round(recipe, store, rounds_of(recipe, None), carry_out)
    return owed[0] if owed else None


def round_recipe(recipe: Recipe, number: int, start: Path | None) -> Recipe:
    """A round's recipe: `start` in the place of the model that the recipe begins with, as what is
    sampled and as what is trained, and other seeds; without it, that model again."""
    first = recipe.model_before()
    evaluation = recipe.evaluation
    assert evaluation is not None

    def moved(config: Any) -> Any:
        changes: dict[str, Any] = {"seed": config.seed + number - 1}
        if start is not None and (config.model, config.revision) == first:
            changes |= {"model": str(start), "revision": None}
        return config.model_copy(update=changes)

    reference = evaluation.kl_reference or KLReference(model=first[0], revision=first[1])
    changes: dict[str, Any] = {
        "candidates": tuple(moved(c) if _samples(c, first) else c for c in recipe.candidates),
        "steps": {name: moved(config) for name, config in recipe.steps.items()},
        "alignment": moved(recipe.alignment),
        "evaluation": evaluation.model_copy(
            update={"seed": evaluation.seed + number - 1, "kl_reference": reference}
        ),
        "name": f"{recipe.name}-round-{number}",
    }
    # The first is the recipe itself, and shares all that it makes with a run of it.
    return recipe.model_copy(update={"rounds": None, **(changes if number > 1 else {})})


def rounds_of(recipe: Recipe, most: int | None) -> RoundsConfig:
    """When a recipe's rounds end. Raises InputError for one that cannot go round."""
    config = recipe.rounds or RoundsConfig()
    if recipe.evaluation is None:
        raise InputError(
            f"{recipe.name}: no `evaluation`, which says whether a round was a gain; add it"
        )
    try:
        config.check(recipe.evaluation, recipe.askable_judge() is not None)
    except ValueError as error:
        raise InputError(f"{recipe.name}: {error}") from None
    first = recipe.model_before()
    if not any(_samples(c, first) for c in recipe.candidates):
        raise InputError(
            f"{recipe.name}: no candidates are sampled from {first[0]}, which training starts "
            "from, so another round would see the same answers; sample some from it"
        )
    weights = recipe.trainings[ALIGNMENT].weights
    if weights in NOT_MERGED:
        raise InputError(
            f"{recipe.name}: alignment.weights: {weights} cannot be merged, and the next round "
            "starts from the merged model; say lora or full"
        )
    for name, training in recipe.trainings.items():
        model = training.reward_model if isinstance(training, RewardedConfig) else None
        if model is not None and model not in recipe.steps:
            raise InputError(
                f"{recipe.name}: {name}.reward_model: {model} fits the first round's base alone; "
                "train it as a step, so that every round has its own"
            )
    return config if most is None else config.model_copy(update={"most": most})


def policy_of(path: Path, store: Store) -> Path:
    """The model that a finished recipe trained, whole."""
    recipe = load_recipe(path)
    dataset = plan_with_answers(recipe, store).dataset
    return handed_on(recipe, store, training_artifacts(recipe, dataset))


def rounds_table(rounds: Sequence[Round], found: Verdict) -> NamedTable:
    """Win rate against the round before, distance from the first, and checks, round by round."""
    names = [*rounds[0].checks] if rounds else []
    header = ("round", "pairs", "win rate", "KL, nats", *(n.replace("_", " ") for n in names), "")
    before = [interval(rounds[0].checks[name][0]) for name in names] if rounds else []
    rows = [("start", "", "", "0", *before, "kept" if found.over and not found.kept else "")]
    for one in rounds:
        after = [interval(one.checks[name][1]) for name in names]
        said = "kept" if one.number == found.kept else "" if one.is_gain else "no gain"
        figures = (f"{one.pairs:,}", interval(one.win_rate), interval(one.kl))
        rows.append((str(one.number), *figures, *after, said))
    return NamedTable("Rounds", header, tuple(rows), found.reason)


def _samples(config: Any, first: tuple[str, str | None]) -> bool:
    """Whether these candidates are answers of the model that training starts from."""
    return (
        isinstance(config, SampledCandidates)
        and config.engine != "openai"
        and config.adapter is None
        and (config.model, config.revision) == first
    )


def _fingerprint(recipe: Recipe) -> str:
    """Of what the rounds are, whatever people have said so far."""
    evaluation = make_plan(recipe).evaluation
    assert evaluation is not None
    return evaluation.fingerprint


def _written(store: Store, first: str, number: int, text: str) -> Path:
    """The round's recipe as a file of this machine."""
    place = ("rounds", first, f"round-{number}.yaml")
    path = machine_folder(store).joinpath(*place)
    if store.read_text(store.path(*place)) != text:
        store.write_text(store.path(*place), text)
    if not store.is_local:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return path


def _finished(path: Path, number: int, store: Store) -> Round | None:
    plan = plan_with_answers(load_recipe(path), store)
    assert plan.evaluation is not None
    assert plan.alignment is not None
    evaluated, dataset = store.manifest(plan.evaluation), store.manifest(plan.dataset)
    if evaluated is None or dataset is None:
        return None
    told = evaluated.summary
    artifacts = (str(plan.dataset), str(plan.alignment))
    measured = (told["win_rate"], told["kl"], told["checks"])
    return Round(number, str(path), *artifacts, dataset.rows, *measured)
