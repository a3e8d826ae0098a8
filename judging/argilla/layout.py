"""How a recipe is laid out in Argilla: in which datasets, with which questions, seen by whom.

Argilla wants as many answers to each record as its dataset says, and the answers that can be given
belong to the dataset too. So a recipe has several.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from judging.argilla import page
from judging.argilla.api import Argilla, Json
from judging.argilla.server import WORKSPACE
from judging.people import LETTERS
from preferences.errors import InputError, ServiceError

BETTER, ORDER, CONFIDENCE, REASON = "better", "order", "confidence", "reason"
"""The names of Argilla's questions about a record."""
VERDICTS = {"a": "A is better", "tie": "Tie", "b": "B is better", "both bad": "Both are bad"}
"""In this order, in which the keys 1 to 4 choose them."""
CONFIDENCES = {"sure": "Sure", "fairly sure": "Fairly sure", "a guess": "A guess"}
PURPOSE, CATEGORY = "purpose", "category"
"""Metadata that owners and admins can filter by. Annotators do not see it: it tells gold apart."""
MARK = "pairwright"
"""In a dataset's metadata: whose it is, and of which kind."""
LONGEST_GUIDELINES = 10_000
"""Characters; Argilla refuses longer ones."""


@dataclass(frozen=True, slots=True, order=True)
class Kind:
    """What the questions of one dataset have in common."""

    answers: int
    """Shown in each; of three and more, people say the order."""
    overlapping: bool
    """Whether several people are to answer each."""

    def name(self, recipe: str) -> str:
        """The dataset's, as labellers see it."""
        ranking = f"-ranking-{self.answers}" if self.answers > 2 else ""
        return f"{recipe}{ranking}{'-overlap' if self.overlapping else ''}"


@dataclass(frozen=True, slots=True)
class Dataset:
    """One that is there."""

    id: str
    kind: Kind
    people: int
    """Who are to answer each record, by what Argilla holds."""
    facts: Json


def workspace_of(api: Argilla) -> Json | None:
    """The workspace in which people label; None if there is none yet."""
    spaces: list[Json] = api.get("/me/workspaces")["items"]
    return next((space for space in spaces if space["name"] == WORKSPACE), None)


def make_workspace(api: Argilla) -> Json:
    """The workspace in which people label; raises InputError if only an owner could make it."""
    me = api.me()
    if workspace_of(api) is None and me.role != "owner":
        raise InputError(
            f"workspace {WORKSPACE!r}: not among those of {me.username}; an owner of this Argilla "
            f"has to make it and to add {me.username} to it"
        )
    if workspace_of(api) is None:
        api.create("/workspaces", {"name": WORKSPACE})
    found = workspace_of(api)
    assert found is not None
    return found


def datasets_of(api: Argilla, workspace: Json, recipe: str) -> Iterator[Dataset]:
    """A recipe's datasets that are there, also those that are only half made."""
    for facts in api.get("/me/datasets", workspace_id=workspace["id"])["items"]:
        mark = (facts.get("metadata") or {}).get(MARK)
        if isinstance(mark, dict) and mark.get("recipe") == recipe:
            kind = Kind(mark["answers"], mark["overlapping"])
            yield Dataset(facts["id"], kind, facts["distribution"]["min_submitted"], facts)


def make_dataset(
    api: Argilla, workspace: Json, recipe: str, kind: Kind, people: int, guidelines: str
) -> str:
    """The id of a kind's dataset, which is made, completed or brought up to date if need be.

    Raises InputError if its name is taken.
    """
    wanted = {
        "distribution": {"strategy": "overlap", "min_submitted": people},
        "guidelines": page.neutral(guidelines)[:LONGEST_GUIDELINES] or None,
    }
    if (found := _dataset(api, workspace, recipe, kind)) is None:
        mark = {"recipe": recipe, "answers": kind.answers, "overlapping": kind.overlapping}
        facts = {"name": kind.name(recipe), "workspace_id": workspace["id"], **wanted}
        api.create("/datasets", {**facts, "metadata": {MARK: mark}})
        found = _dataset(api, workspace, recipe, kind)
        if found is None:
            raise InputError(
                f"dataset {kind.name(recipe)!r} in Argilla's workspace {WORKSPACE!r} is not this "
                "recipe's; rename it there, or give the recipe another name"
            )
    path = f"/datasets/{found.id}"
    if found.facts["status"] == "draft":
        try:
            _complete(api, path, kind)
        except ServiceError:
            # It is refused where it is done: by another process, or by this one, unheard.
            if api.get(path)["status"] == "draft":
                raise
    else:
        for field in api.get(f"{path}/fields")["items"]:
            if field["name"] == page.FIELD and field["settings"] != page.field_settings():
                api.change(f"/fields/{field['id']}", {"settings": page.field_settings()})
    stale = {name: value for name, value in wanted.items() if found.facts[name] != value}
    if stale:
        api.change(path, stale)
    return found.id


def _complete(api: Argilla, path: str, kind: Kind) -> None:
    # One that was interrupted has some of this already; names are unique in a dataset.
    api.create(f"{path}/fields", _field())
    for question in _questions(kind):
        api.create(f"{path}/questions", question)
    for name in (PURPOSE, CATEGORY):
        terms = {"name": name, "title": name.capitalize(), "settings": {"type": "terms"}}
        api.create(f"{path}/metadata-properties", {**terms, "visible_for_annotators": False})
    api.put(f"{path}/publish")


def usernames(api: Argilla, workspace: Json) -> Mapping[str, str]:
    """Of all who can have answered, by their id."""
    everybody = api.me().role == "owner"
    found = api.get("/users" if everybody else f"/workspaces/{workspace['id']}/users")
    return {user["id"]: user["username"] for user in found["items"]}


def _dataset(api: Argilla, workspace: Json, recipe: str, kind: Kind) -> Dataset | None:
    found = datasets_of(api, workspace, recipe)
    return next((dataset for dataset in found if dataset.kind == kind), None)


def _field() -> Json:
    settings = page.field_settings()
    return {"name": page.FIELD, "title": "Comparison", "required": True, "settings": settings}


def _questions(kind: Kind) -> list[Json]:
    labels = LETTERS[: kind.answers]
    if kind.answers == 2:
        title, choice = "Which answer is better?", _choice("label_selection", VERDICTS)
    else:
        title = "From the best answer (1) to the worst; equal ones get the same place"
        choice = _choice("ranking", {label: f"Answer {label}" for label in labels})
    about = "Leave it out if you like."
    return [
        _question(BETTER if kind.answers == 2 else ORDER, title, choice, required=True),
        _question(CONFIDENCE, "How sure are you?", _choice("label_selection", CONFIDENCES), about),
        _question(REASON, "Why?", {"type": "text", "use_markdown": False}, about),
    ]


def _choice(kind: str, options: Mapping[str, str]) -> Json:
    return {"type": kind, "options": [{"value": v, "text": t} for v, t in options.items()]}


def _question(
    name: str, title: str, settings: Json, about: str | None = None, required: bool = False
) -> Json:
    facts: dict[str, Any] = {"name": name, "title": title, "description": about}
    return {**facts, "required": required, "settings": settings}
