"""People's answers on their way from where people label to the recipe: push, wait, pull.

What was pulled is kept in the store, under the recipe's name, so that a plan is made without asking
a server. A table that the recipe names is read itself.

    labels/<recipe>/argilla.jsonl    what people have said in Argilla
    labels/<recipe>/<table>.jsonl    what was imported from a table
    labels/<recipe>/asked.json       what was asked, and since when
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from flows.plan import Plan, make_plan
from flows.recipe import Recipe
from judging.gold import read_gold
from judging.people import People, Question, TableOfLabels
from judging.routing import PeopleConfig
from judging.rubric import rubric_text
from preferences.errors import InputError, ServiceError
from preferences.records import Dropped, Judgment
from preferences.store import Store

if TYPE_CHECKING:
    from judging.argilla.labels import ArgillaPeople

ARGILLA = "argilla"
"""What `people.labels` says in place of a table's name."""
ARGILLA_URL = "ARGILLA_API_URL"
"""The environment variable that names another server than the store's own."""

Answer = Judgment | Dropped
_ANSWER: TypeAdapter[Answer] = TypeAdapter(Answer)


@dataclass(frozen=True)
class Asked:
    """What a recipe has asked of people, and since when."""

    since: datetime
    """When these judgments first led to questions."""
    judgments: str
    """Those that led to them; other judgments, another wait."""
    wanted: Mapping[str, int]
    """Answers wanted, by the words of what each question is about, without its purpose."""
    ended: bool = False
    """Whether the dataset was made after all, without the answers that are missing."""

    def until(self, config: PeopleConfig) -> datetime | None:
        """When the wait ends without them; None where there is no wait."""
        days = config.wait_days
        return None if days is None else self.since + timedelta(days=days)

    def missing(self, answers: Iterable[Answer]) -> int:
        """How many answers are still wanted."""
        given = Counter(
            " ".join([a.prompt_id, *a.candidate_ids]) for a in answers if isinstance(a, Judgment)
        )
        return sum(max(wanted - given[about], 0) for about, wanted in self.wanted.items())


_ASKED: TypeAdapter[Asked] = TypeAdapter(Asked)


def people_of(recipe: Recipe, place: Store) -> People:
    """Those whom a recipe asks, where it asks them."""
    assert recipe.people is not None
    if recipe.people.labels == ARGILLA:
        return argilla_people(recipe, place)
    return TableOfLabels(recipe.people.labels)


def argilla_people(recipe: Recipe, place: Store) -> ArgillaPeople:
    """The recipe's people in Argilla. Raises ServiceError if no server answers."""
    from judging.argilla.api import connect
    from judging.argilla.labels import ArgillaPeople

    assert recipe.people is not None
    url, key = _server(recipe, place)
    overlap = recipe.people.overlap
    return ArgillaPeople(connect(url, key), recipe.name, _guidelines(recipe), overlap)


def argilla_home(place: Store) -> Path:
    """The folder of the Argilla server that belongs to a store."""
    return (Path(place.root) if place.is_local else Path(".pairwright")) / "argilla"


def _server(recipe: Recipe, place: Store) -> tuple[str, str | None]:
    """URL and key: of the server that environment or recipe name, to which the environment has the
    key, or of the store's own."""
    from judging.argilla.server import running_at

    url = os.environ.get(ARGILLA_URL) or recipe.runtime.argilla_url
    if url:
        return url, None
    home = argilla_home(place)
    found = running_at(home)
    if found is None:
        raise ServiceError(
            f"no Argilla server is running in {home}; start it with `pairwright label serve` or "
            f"`pairwright up`, or name another with --argilla-url"
        )
    return found


def _guidelines(recipe: Recipe) -> Callable[[bool], str]:
    """What counts, by the first judge's rubric; by whether people are to rank."""
    from judging.argilla.guidelines import guidelines

    rubrics = [r for judge in recipe.judges if (r := getattr(judge, "rubric", None)) is not None]
    text = rubric_text(rubrics[0]) if rubrics else None
    return lambda ranking: guidelines(text, ranking)


def gold_questions(config: PeopleConfig) -> list[Question]:
    """The recipe's questions whose right answer is known."""
    return [] if config.gold is None else [gold.question for gold in read_gold(config.gold)]


def answers_so_far(recipe: Recipe, place: Store) -> tuple[Answer, ...]:
    """All that people have said and that is here: in the recipe's table, pulled or imported."""
    if recipe.people is None:
        return ()
    found: list[Answer] = []
    for path in sorted(place.fs.glob(_path(place, recipe, "*.jsonl"))):
        lines = (place.read_text(path) or "").splitlines()
        found += [_ANSWER.validate_python(json.loads(line)) for line in lines]
    if recipe.people.labels != ARGILLA:
        found += TableOfLabels(recipe.people.labels).answers()
    return tuple({_id(answer): answer for answer in found}.values())


def plan_with_answers(recipe: Recipe, place: Store) -> Plan:
    """The recipe's plan, with all that people have said so far."""
    return make_plan(recipe, answers_so_far(recipe, place))


def pull(recipe: Recipe, place: Store) -> int:
    """Take what people have said in Argilla into the store; returns how many answers are new."""
    if recipe.people is None or recipe.people.labels != ARGILLA:
        return 0
    return _keep(recipe, place, ARGILLA, argilla_people(recipe, place).answers())


def take_up(recipe: Recipe, place: Store, say: Callable[[str], None]) -> None:
    """Pull, as the first step of something else: without a server, what is here has to do."""
    try:
        new = pull(recipe, place)
    except ServiceError as error:
        say(f"! no new answers from Argilla: {error}")
    else:
        if new:
            say(f"people: {new:,} new or changed answers")


def import_table(recipe: Recipe, place: Store, table: Path) -> int:
    """Take the answers of a table into the store; returns how many are new."""
    if not table.exists():
        raise InputError(f"{table}: no such table; `pairwright label export` writes one")
    return _keep(recipe, place, f"table-{table.stem}", TableOfLabels(table).answers())


def ask(recipe: Recipe, place: Store, judgments: str, questions: Sequence[Question]) -> Asked:
    """Put the questions to people, among the gold ones, and remember what was asked."""
    assert recipe.people is not None
    people_of(recipe, place).ask([*questions, *gold_questions(recipe.people)])
    overlap = recipe.people.overlap if recipe.people.labels == ARGILLA else 1
    wanted = {
        q.about.words.partition(" ")[2]: overlap if q.purpose == "calibrate" else 1
        for q in questions
    }
    before = asked_before(recipe, place)
    asked = Asked(now(), judgments, wanted)
    if before is not None and before.judgments == judgments:
        asked = replace(before, wanted=wanted)
    if asked != before:
        _remember(recipe, place, asked)
    return asked


def asked_before(recipe: Recipe, place: Store) -> Asked | None:
    """What the recipe has asked; None if nothing."""
    text = place.read_text(_path(place, recipe, "asked.json"))
    return None if text is None else _ASKED.validate_python(json.loads(text))


def end_wait(recipe: Recipe, place: Store, asked: Asked) -> None:
    """Remember that the dataset waits no more."""
    if not asked.ended:
        _remember(recipe, place, replace(asked, ended=True))


def is_over(recipe: Recipe, asked: Asked) -> bool:
    """Whether the time to answer is over, or there is none."""
    assert recipe.people is not None
    until = asked.until(recipe.people)
    return until is None or now() >= until


def now() -> datetime:
    """To the second."""
    return datetime.now(UTC).replace(microsecond=0)


def _remember(recipe: Recipe, place: Store, asked: Asked) -> None:
    values = {**asdict(asked), "since": asked.since.isoformat()}
    place.write_text(_path(place, recipe, "asked.json"), json.dumps(values))


def _keep(recipe: Recipe, place: Store, door: str, answers: Iterable[Answer]) -> int:
    """Write the answers that came through a door in the place of those that came before."""
    path = _path(place, recipe, f"{door}.jsonl")
    before = set((place.read_text(path) or "").splitlines())
    # In ASCII: half a surrogate pair, which UTF-8 does not have, is only an escape there.
    lines = [json.dumps(asdict(answer)) for answer in answers]
    if before != set(lines):
        place.write_text(path, "".join(f"{line}\n" for line in lines))
    return len(set(lines) - before)


def _path(place: Store, recipe: Recipe, name: str) -> str:
    return place.path("labels", recipe.name, name)


def _id(answer: Answer) -> str:
    return answer.record_id if isinstance(answer, Dropped) else answer.judgment_id
