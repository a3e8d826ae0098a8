"""What a recipe will make, worked out before anything is made.

Each stage's artifact is named by what goes into it: the content of the files, the identity of the
models, the configuration, and the names of the artifacts before it. So the plan tells, without
running anything, what is done and what is owed; an edited rubric changes the judgments and what
follows from them, and nothing else.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.measuring import EvaluationConfig
from flows.recipe import AskableJudge, CandidateConfig, JudgeConfig, Recipe
from flows.steps import ALIGNMENT
from generation.candidates import ImportedCandidates, SampledCandidates
from generation.engine import EngineConfig
from generation.models import model_identity, weights_identity
from generation.prompts import PromptsConfig, sources
from judging.imported import ImportedJudgments
from judging.listwise import ListwiseJudge
from judging.pairwise import ComparingJudge, PairwiseJudge
from judging.people import NAME
from judging.pointwise import PointwiseJudge
from judging.prior import Prior
from judging.reasoned import ReasonedPairwiseJudge
from judging.reward_model import RewardModelJudge
from judging.rubric import load_rubric
from judging.verifier import Verifier
from preferences.errors import InputError
from preferences.fingerprint import file_fingerprint, fingerprint
from preferences.records import SCHEMA_VERSION, Dropped, Judgment
from preferences.store import Artifact
from preferences.tables import table_fingerprint, table_name
from training.pretraining import PretrainingConfig
from training.rewarded import RewardedConfig
from training.settings import TrainingConfig

WELL_FORMED = "well_formed"
"""The evaluation's check of this name also watches over training."""


@dataclass(frozen=True)
class Plan:
    """The artifacts of a recipe, in the order in which they are made."""

    recipe: Recipe
    prompts: Artifact
    candidates: tuple[Artifact, ...]
    judgments: tuple[Artifact, ...]
    answers: Artifact | None
    """What people said when they were asked, as judgments."""
    given: tuple[Judgment | Dropped, ...]
    """The same, as read before the plan was made: people may go on writing."""
    routes: Artifact | None
    rankings: Artifact
    preferences: Artifact
    dataset: Artifact
    steps: tuple[Artifact, ...]
    alignment: Artifact | None
    evaluation: Artifact | None

    @property
    def said(self) -> list[Artifact]:
        """All judgments, of judges and of people."""
        return [*self.judgments, *([self.answers] if self.answers else [])]

    @property
    def artifacts(self) -> list[tuple[str, Artifact]]:
        """Every artifact with what people call it."""
        named: list[tuple[str, Artifact | None]] = [
            ("prompts", self.prompts),
            *zip(
                (f"candidates: {c.name}" for c in self.recipe.candidates),
                self.candidates,
                strict=True,
            ),
            *_named("judgments", self.recipe.judges, self.judgments),
            (f"judgments: {NAME}", self.answers),
            ("routes", self.routes),
            ("rankings", self.rankings),
            ("preferences", self.preferences),
            ("dataset", self.dataset),
            *zip((f"steps: {name}" for name in self.recipe.steps), self.steps, strict=True),
            ("alignment", self.alignment),
            ("evaluation", self.evaluation),
        ]
        return [(name, artifact) for name, artifact in named if artifact is not None]


def make_plan(recipe: Recipe, given: Sequence[Judgment | Dropped] = ()) -> Plan:
    """Name every artifact of a recipe, with what people have said when they were asked.

    Raises InputError if a file or model is not there.
    """
    imports = [c for c in recipe.candidates if isinstance(c, ImportedCandidates)]
    prompts = _artifact(
        "prompts",
        _prompts_identity(recipe.prompts)
        if recipe.prompts
        else [_candidates_identity(c) for c in imports],
    )
    candidates = tuple(
        _artifact("candidates", [str(prompts), _candidates_identity(c)]) for c in recipe.candidates
    )
    judgments: tuple[Artifact, ...] = ()
    for judge in recipe.judges:
        place = recipe.prior_of(judge)
        known = [] if place is None else [str(judgments[place])]
        identity = [[str(c) for c in candidates], judge_identity(judge), *known]
        judgments += (_artifact("judgments", identity),)
    answers = routes = None
    said = judgments
    if recipe.people is not None:
        # What people said, not the bytes of the table: a build writes questions into it.
        answers = _artifact("judgments", [[str(c) for c in candidates], NAME, given])
        said = (*judgments, answers)
        # Where, how often and how long people are asked changes nothing of who is worth asking.
        elsewhere = {"labels", "overlap", "gold", "wait_days"}
        asking = recipe.people.model_dump(mode="json", exclude=elsewhere)
        routes = _artifact("routes", [[str(j) for j in said], asking])
    rankings = _artifact("rankings", [[str(c) for c in candidates], [str(j) for j in said]])
    preferences = _artifact("preferences", [str(rankings), recipe.pairs, recipe.calibration])
    dataset = _artifact(
        "dataset",
        [
            *[str(preferences), recipe.split, recipe.name, recipe.description, recipe.license],
            # The card tells what people were asked.
            *([str(routes)] if routes else []),
        ],
    )
    trained = training_artifacts(recipe, dataset)
    steps = tuple(artifact for name, artifact in trained.items() if name != ALIGNMENT)
    alignment, evaluation = trained.get(ALIGNMENT), None
    if alignment is not None and recipe.evaluation is not None:
        evaluation = evaluation_artifact(recipe, recipe.evaluation, alignment)
    return Plan(
        recipe,
        prompts,
        candidates,
        judgments,
        answers,
        tuple(given),
        routes,
        rankings,
        preferences,
        dataset,
        steps,
        alignment,
        evaluation,
    )


def training_artifacts(recipe: Recipe, dataset: Artifact) -> dict[str, Artifact]:
    """The models that a recipe trains on a dataset, its own or another, by the trainings' names.

    A step is what its own configuration and the steps before it make it; its name and what comes
    after it are no part of that.
    """
    found: dict[str, Artifact] = {}
    for name, config in recipe.trainings.items():
        watched: list[Any] = []
        if config.probe is not None:
            # The judge and the check that watch over training decide where it stops.
            judge = recipe.askable_judge()
            checks = recipe.evaluation.checks if recipe.evaluation else {}
            watched.append(judge_identity(judge) if judge else None)
            watched += [_check_identity(c) for n, c in checks.items() if n == WELL_FORMED]
        identity = [_data_identity(config, dataset), _training_identity(config, found), watched]
        found[name] = _artifact("alignment", identity)
    return found


def _data_identity(config: TrainingConfig, dataset: Artifact) -> Any:
    if not isinstance(config, PretrainingConfig) or config.texts is None:
        return str(dataset)
    texts = config.texts
    tables = [[table_fingerprint(table) for table in of] for of in (texts.new, texts.old)]
    return [tables, texts.column, texts.held_out]


def evaluation_artifact(
    recipe: Recipe, evaluation: EvaluationConfig, alignment: Artifact
) -> Artifact:
    """The comparison of a trained model with the one it started from."""
    judge, far = recipe.askable_judge(), evaluation.kl_reference
    return _artifact(
        "evaluation",
        [
            str(alignment),
            evaluation.model_dump(mode="json", exclude={"prompts", "checks", "kl_reference"}),
            weights_identity(far.model, far.revision) if far else None,
            _prompts_identity(evaluation.prompts) if evaluation.prompts else None,
            judge_identity(judge) if judge else None,
            {name: _check_identity(check) for name, check in evaluation.checks.items()},
        ],
    )


def engine_config(config: EngineConfig) -> EngineConfig:
    """The engine part of a configuration."""
    return EngineConfig(**config.model_dump(include=set(EngineConfig.model_fields)))


def _named(
    stage: str, configs: Sequence[CandidateConfig | JudgeConfig], artifacts: Sequence[Artifact]
) -> list[tuple[str, Artifact]]:
    return [(f"{stage}: {c.name}", a) for c, a in zip(configs, artifacts, strict=True)]


def _artifact(stage: str, identity: Any) -> Artifact:
    return Artifact(stage, fingerprint([stage, SCHEMA_VERSION, identity]))


def _prompts_identity(config: PromptsConfig) -> Any:
    kept = config.model_dump(mode="json", exclude={"source": True, "decontamination": {"against"}})
    return [kept, [_table_identity(s, config.split) for s in sources(config)]]


def _table_identity(source: str, split: str = "train") -> list[str]:
    # The name stands in every record's `source`.
    return [table_name(source), table_fingerprint(source, split)]


def _candidates_identity(config: SampledCandidates | ImportedCandidates) -> Any:
    if isinstance(config, ImportedCandidates):
        kept = config.model_dump(mode="json", exclude={"source"})
        return [kept, _table_identity(config.source, config.split)]
    return [
        config.name,
        model_identity(engine_config(config)),
        config.samples,
        config.sampling.model_dump(mode="json"),
        config.seed,
    ]


def judge_identity(config: AskableJudge | ImportedJudgments | Prior) -> Any:
    """What a judge's judgments depend on besides the answers."""
    match config:
        case PairwiseJudge():
            return [*_asked(config), load_rubric(config.rubric).identity, _schedule(config)]
        case ReasonedPairwiseJudge():
            rubric = load_rubric(config.rubric, config.kind).identity
            drawn = [config.samples, config.temperature, config.max_tokens]
            return [*_asked(config), rubric, drawn, _schedule(config)]
        case PointwiseJudge():
            criteria = [
                [load_rubric(name, config.kind).identity, weight]
                for name, weight in config.criteria.items()
            ]
            return [*_asked(config), criteria]
        case ListwiseJudge():
            rubric = load_rubric(config.rubric, config.kind).identity
            return [*_asked(config), rubric, config.rounds]
        case RewardModelJudge():
            weights = weights_identity(config.model, config.revision)
            return [config.kind, config.name, weights, config.dtype, config.trust_remote_code]
        case Verifier():
            return [config.kind, config.name, _check_identity(config.check), config.pattern]
        case ImportedJudgments():
            kept = config.model_dump(mode="json", exclude={"source"})
            return [kept, _table_identity(config.source, config.split)]
        case Prior():
            return config.model_dump(mode="json")


def _schedule(config: ComparingJudge) -> Any:
    if config.schedule != "adaptive":
        return config.schedule
    return [config.schedule, config.min_gain, config.worst, config.prior]


def _asked(config: PairwiseJudge | ReasonedPairwiseJudge | PointwiseJudge | ListwiseJudge) -> Any:
    return [config.kind, config.name, model_identity(engine_config(config))]


def _check_identity(check: str) -> Any:
    """A check is what its code says: the file's content bears identity, not where it lies."""
    place, _, function = check.rpartition(":")
    if not place:
        return check
    if place.endswith(".py"):
        path = place
    else:
        try:
            spec = importlib.util.find_spec(place)
        except ImportError:
            spec = None
        if spec is None or spec.origin is None:
            raise InputError(f"{check}: no module {place!r}; check the name or install it")
        path = spec.origin
    if not Path(path).is_file():
        raise InputError(f"{place}: no such file; check the path of the check")
    with Path(path).open("rb") as stream:
        return [function, file_fingerprint(stream)]


def _training_identity(config: TrainingConfig, steps: Mapping[str, Artifact]) -> Any:
    elsewhere = {"model", "revision", "reward_model", "reward_functions", "texts"}

    def start(model: str, revision: str | None) -> str:
        return str(steps[model]) if model in steps else weights_identity(model, revision)

    kept: list[Any] = [
        config.model_dump(mode="json", exclude=elsewhere),
        start(config.model, config.revision),
    ]
    if isinstance(config, RewardedConfig):
        kept.append(start(config.reward_model, None) if config.reward_model else None)
        kept.append({n: _check_identity(f) for n, f in config.reward_functions.items()})
    return kept
