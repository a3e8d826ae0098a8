"""The recipe: one YAML file that says what to build, checked as a whole before any work starts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from flows.measuring import EvaluationConfig, RoundsConfig
from flows.steps import ALIGNMENT, check_steps, model_before, named_trainings
from generation.candidates import ImportedCandidates, SampledCandidates
from generation.engine import EngineRuntime
from generation.prompts import PromptsConfig
from judging.imported import ImportedJudgments
from judging.listwise import ListwiseJudge
from judging.pairwise import ComparingJudge, PairwiseJudge
from judging.people import NAME
from judging.pointwise import PointwiseJudge
from judging.prior import Prior
from judging.reasoned import ReasonedPairwiseJudge
from judging.reward_model import RewardModelJudge
from judging.routing import PeopleConfig
from judging.rubric import Shape
from judging.verifier import Verifier
from preferences.assembly import PairsConfig
from preferences.config import Config
from preferences.errors import InputError
from preferences.splits import SplitConfig
from preferences.tables import suggestion
from training.methods import METHODS, Alignment
from training.processes import why_not
from training.run import TrainingRuntime
from training.settings import TrainingConfig

CandidateConfig = Annotated[SampledCandidates | ImportedCandidates, Field(discriminator="kind")]
AskableJudge = (
    PairwiseJudge
    | ReasonedPairwiseJudge
    | PointwiseJudge
    | ListwiseJudge
    | RewardModelJudge
    | Verifier
)
"""A judge that can be asked about new answers; the others only know the ones they came with."""
JudgeConfig = Annotated[AskableJudge | ImportedJudgments | Prior, Field(discriminator="kind")]


class Runtime(Config):
    """Where and how the recipe runs. Nothing here changes a result, so nothing bears identity."""

    store: str = "store"
    """The folder or bucket that holds journal and artifacts; a relative one is relative to where
    the program is started."""
    shard_size: int = Field(1000, ge=1)
    """Prompts worked on at a time."""
    engines: dict[str, EngineRuntime] = Field(default_factory=dict)
    """By the name of the candidates or of the judge; `policy` for the model that is evaluated."""
    argilla_url: str | None = None
    """Where people label, if not in the store's own Argilla; a key to it is in ARGILLA_API_KEY."""
    training: TrainingRuntime = TrainingRuntime()
    """Where training runs."""


class Recipe(Config):
    """What to build, from prompts to the evaluated model."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """What the dataset and its flows are called."""
    description: str = ""
    """A sentence for the dataset card."""
    license: str | None = None
    """Of the dataset, for its card."""
    prompts: PromptsConfig | None = None
    """Where prompts come from; by default they are those of the imported answers."""
    candidates: tuple[CandidateConfig, ...] = Field(min_length=1)
    """Who answers them."""
    judges: tuple[JudgeConfig, ...] = Field(min_length=1)
    """Who says which answer is better."""
    calibration: Literal["logistic", "isotonic"] = "logistic"
    """How the judges are brought to people's scale, where people judged enough pairs: by a formula
    of few terms, or by a step function on top of it, for a thousand labels or more."""
    people: PeopleConfig | None = None
    """What people are asked; without it, the judges' word is all there is."""
    pairs: PairsConfig = PairsConfig()
    """Which answers become chosen and rejected."""
    split: SplitConfig = SplitConfig()
    """What is held out."""
    steps: dict[str, Alignment] = Field(default_factory=dict)
    """Models trained on the dataset before the alignment, by names of yours, in this order; later
    ones and the alignment start from them by `model` and `reward_model`."""
    alignment: Alignment | None = None
    """How a model is trained on the dataset; without it, the recipe ends with the dataset."""
    evaluation: EvaluationConfig | None = None
    """How the trained model is compared with the one it started from."""
    rounds: RoundsConfig | None = None
    """When `pairwright iterate`, which does it all again with the model it trained, ends."""
    runtime: Runtime = Runtime()
    """Where and how all this runs."""

    @model_validator(mode="after")
    def _names_fit(self) -> Recipe:
        for what, parts in (("candidates", self.candidates), ("judges", self.judges)):
            names = [part.name for part in parts]
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"{what}: two are named {name!r}; give each its own name")
        if self.people is not None and NAME in [judge.name for judge in self.judges]:
            raise ValueError(f"judges: with `people`, none can be named {NAME!r}; rename it")
        earlier: list[str] = []
        for judge in self.judges:
            prior = judge.prior if isinstance(judge, ComparingJudge) else None
            if prior is not None and prior not in earlier:
                raise ValueError(
                    f"judges: {judge.name!r} has the prior {prior!r}, which is no judge before it; "
                    "name one that stands earlier in the list"
                )
            earlier.append(judge.name)
        schedules = {j.schedule if isinstance(j, ComparingJudge) else None for j in self.judges}
        if schedules == {"knockout"} and self.pairs.policy in ("best_worst", "max_min"):
            raise ValueError(
                f"pairs.policy: {self.pairs.policy!r} needs the worst answer, but a knock-out "
                "finds the best alone; take `best_random`, or the schedule `adaptive`"
            )
        imported = [c for c in self.candidates if isinstance(c, ImportedCandidates)]
        if self.prompts is None and not imported:
            raise ValueError("prompts: missing; give a source, or import answers with prompts")
        check_steps(self.steps, self.alignment)
        listwise = any(one.method == "ranked_dpo" for one in self.trainings.values())
        if listwise and self.pairs.policy not in ("all_pairs", "delta"):
            raise ValueError(
                f"pairs.policy: ranked_dpo learns from several pairs of a prompt, and "
                f"{self.pairs.policy!r} makes one; say all_pairs, or method: dpo"
            )
        for training in self.trainings.values():
            reason = why_not(training, self.runtime.training)
            if reason is not None:
                raise ValueError(f"runtime.training: {reason}")
        if self.rounds is not None:
            if self.evaluation is None:
                raise ValueError("rounds: need `evaluation`, which says whether a round was a gain")
            self.rounds.check(self.evaluation, self.askable_judge() is not None)
        if self.evaluation is not None:
            if self.alignment is None:
                raise ValueError("evaluation: needs `alignment`, there is no model to evaluate")
            if self.alignment.method == "reward":
                raise ValueError(
                    "evaluation: a reward model gives no answers to compare; leave it out, the "
                    "held-out accuracy is reported anyway"
                )
            self.askable_judge()
        known = {*(c.name for c in self.candidates), *(j.name for j in self.judges), "policy"}
        for name in self.runtime.engines:
            if name not in known:
                raise ValueError(f"runtime.engines: no {name!r}; {suggestion(name, sorted(known))}")
        return self

    @property
    def trainings(self) -> dict[str, TrainingConfig]:
        """Every training by its name, in their order: the steps and `alignment`."""
        return named_trainings(self.steps, self.alignment)

    def model_before(self, training: str = ALIGNMENT) -> tuple[str, str | None]:
        """The model that a training and the steps before it began with, and its revision."""
        return model_before(self.trainings, training)

    def prior_of(self, judge: JudgeConfig) -> int | None:
        """The place among the judges of the one that this judge's schedule starts from."""
        if not isinstance(judge, ComparingJudge) or judge.prior is None:
            return None
        return [j.name for j in self.judges].index(judge.prior)

    def askable_judge(self) -> AskableJudge | None:
        """The judge that compares new answers: the one `evaluation.judge` names, or the first."""
        askable: dict[str, AskableJudge] = {
            j.name: j for j in self.judges if not isinstance(j, ImportedJudgments | Prior)
        }
        wanted = self.evaluation.judge if self.evaluation else None
        if wanted is None:
            return next(iter(askable.values()), None)
        if wanted not in askable:
            raise ValueError(f"evaluation.judge: no {wanted!r}; {suggestion(wanted, askable)}")
        return askable[wanted]


def load_recipe(
    path: str | Path, settings: Mapping[str, str] | None = None, dataset_only: bool = False
) -> Recipe:
    """Read and check a recipe; `settings` fill its `${name}` places.

    With `dataset_only`, what comes after the dataset is left out and need not be filled.
    Relative paths in the recipe are relative to its folder. Raises InputError, one line, naming
    the file, the key and the cure.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such recipe; `pairwright init` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {_one_line(error)}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path}: holds no keys; `pairwright init` shows what a recipe looks like")
    if dataset_only:
        raw = {k: v for k, v in raw.items() if k not in AFTER_THE_DATASET}
    filled, folder = _fill(raw, dict(settings or {}), path), path.resolve().parent
    steps = filled.get("steps")
    for name in steps if isinstance(steps, dict) else ():
        if any((place / str(name)).exists() for place in (folder, Path.cwd())):
            raise InputError(
                f"{path}: steps.{name}: there is a file or folder of this name too, so `model: "
                f"{name}` could mean both; give the step another name"
            )
    people = filled.get("people")
    if isinstance(people, dict) and people.get("labels", "argilla") != "argilla":
        # A build writes this table, so it need not be there yet.
        people["labels"] = str(folder / str(people["labels"]))
    try:
        return Recipe.model_validate(_resolve(filled, folder))
    except ValidationError as error:
        raise InputError(f"{path}: {_explain(error)}") from error


def recipe_text(recipe: Recipe, store: str) -> str:
    """A loaded recipe as YAML, which means the same wherever it lies; its store is this one."""
    values = recipe.model_dump(mode="json", exclude_unset=True)
    place = store if "://" in store else str(Path(store).resolve())
    values["runtime"] = {**values.get("runtime", {}), "store": place}
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text


AFTER_THE_DATASET = ("steps", "alignment", "evaluation", "rounds")
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_PATH_KEYS = {
    *("source", "model", "adapter", "rubric", "check", "gold", "against", "checks"),
    *("reward_model", "reward_functions", "new", "old"),
}
_PATH_KEYED = {"criteria"}
"""Keys whose values have paths for their own keys."""


def _fill(value: Any, settings: Mapping[str, str], path: Path) -> Any:
    """Put settings in the place of `${name}`."""
    if isinstance(value, dict):
        return {key: _fill(item, settings, path) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill(item, settings, path) for item in value]
    if not isinstance(value, str):
        return value

    def setting(match: re.Match[str]) -> str:
        if match[1] not in settings:
            raise InputError(f"{path}: ${{{match[1]}}} has no value; add --set {match[1]}=VALUE")
        return settings[match[1]]

    return _VARIABLE.sub(setting, value)


def _resolve(value: Any, folder: Path, is_path: bool = False) -> Any:
    """Make the relative paths that exist beside the recipe absolute."""
    if isinstance(value, dict):
        return {
            key: {_resolve(name, folder, is_path=True): weight for name, weight in item.items()}
            if key in _PATH_KEYED and isinstance(item, dict)
            else _resolve(item, folder, is_path=is_path or key in _PATH_KEYS)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_resolve(item, folder, is_path) for item in value]
    if is_path and isinstance(value, str) and value:
        # A check is `file.py:function`.
        name, colon, function = value.partition(":")
        if (folder / name).exists():
            return f"{folder / name}{colon}{function}"
    return value


def _explain(error: ValidationError) -> str:
    """The first of pydantic's errors, as one line with a cure."""
    first = error.errors(include_url=False)[0]
    loc = first["loc"]
    trained = {"alignment": 1, "steps": 2}.get(str(loc[0])) if loc else None
    if trained is not None:
        location = [*loc[:trained], *(p for p in loc[trained:] if p not in METHODS)]
    else:
        location = [part for part in loc if part not in _KINDS]
    place = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in location).lstrip(".")
    kind = first["type"]
    if kind == "extra_forbidden":
        # What a step can hold is what the alignment can.
        known = _fields_at(loc[:-1] if trained != 2 else ("alignment", *loc[2:-1]))
        return f"{place}: unknown key; {suggestion(str(loc[-1]), known)}"
    if kind == "missing":
        return f"{place}: missing; add it"
    if kind == "union_tag_invalid":
        tag, expected = first["ctx"]["tag"], first["ctx"]["expected_tags"].replace("'", "")
        key = "kind" if trained is None or len(location) > trained else "method"
        return f"{place}.{key}: no {tag!r}; {suggestion(tag, expected.split(', '))}"
    if kind == "union_tag_not_found":
        return f"{place}: no `kind`; say which kind it is"
    message = first["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(first["input"], dict | list) else f"{first['input']!r}: "
    return f"{place + ': ' if place else ''}{shown}{message[0].lower()}{message[1:]}"


_KINDS = {"sample", "import", *get_args(Shape), "reward_model", "verifier", "prior"}


def _fields_at(location: Iterable[int | str]) -> list[str]:
    """The keys that are known at a place in the recipe."""
    found: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        models = list(_models(found))
        tagged = [
            m for m in models for key in ("kind", "method") if part in get_args(_hint(m, key))
        ]
        found = tagged[0] if tagged else next((_hint(m, part) for m in models), None)
    return [name for model in _models(found) for name in model.model_fields]


def _models(hint: Any) -> Iterable[type[BaseModel]]:
    if isinstance(hint, type) and get_origin(hint) is None and issubclass(hint, BaseModel):
        yield hint
    for part in get_args(hint):
        yield from _models(part)


def _hint(model: type[BaseModel], name: str) -> Any:
    field = model.model_fields.get(name)
    return field.annotation if field else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
