"""What routing needs from a build, and what it tells about the people it asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from flows.labels import ARGILLA, Asked
from judging.judge import Group
from judging.noise import Noise
from judging.people import NAME, Purpose, Question, question
from judging.ranking import rank
from judging.raters import is_human
from judging.routing import DELTA, Choice, PeopleConfig, Standing, standings
from preferences.card import markdown_table
from preferences.judge_tables import NamedTable
from preferences.records import Decision, Judgment, Route

Judged = tuple[Group, Sequence[Judgment]]
"""A group with all that was said about it."""
PURPOSES: dict[str, Purpose] = {"calibrate": "calibrate", "ask": "ask"}
"""Of the decisions that put a question to people."""


def standings_of(
    judged: Sequence[Judged], noise: Noise, config: PeopleConfig
) -> Iterator[Standing]:
    """How the judges alone see these groups, and what people who were asked said of them."""
    machines = [j for _, said in judged for j in said if not is_human(j)]
    groups = [group for group, _ in judged]
    rankings = list(rank(groups, machines, noise))
    return standings(rankings, groups, config.category_weights, _answers(judged))


def questions_of(judged: Iterable[Judged], routes: Iterable[Route]) -> Iterator[Question]:
    """What the routes ask of people. What they have answered of another pair is enough."""
    asked = {route.prompt_id: route for route in routes if route.decision in PURPOSES}
    wanted = [(group, said) for group, said in judged if group.prompt.prompt_id in asked]
    answers = _answers(wanted)
    for group, _ in wanted:
        route = asked[group.prompt.prompt_id]
        pair = {route.first_id, route.second_id}
        said = answers[route.prompt_id]
        # Other judges, other rivals; only the random slice has to be measured anew.
        if route.decision == "ask" and said and not any(pair <= {*a.candidate_ids} for a in said):
            continue
        candidates = {c.candidate_id: c for c in group.candidates}
        shown = [candidates[i] for i in (route.first_id, route.second_id, *route.others)]
        yield question(group.prompt, shown, PURPOSES[route.decision])


def _answers(judged: Iterable[Judged]) -> dict[str, list[Judgment]]:
    return {g.prompt.prompt_id: [j for j in said if j.judge == NAME] for g, said in judged}


def routing_summary(
    choice: Choice, decisions: Counter[Decision], config: PeopleConfig
) -> dict[str, Any]:
    """For the manifest of the routes."""
    return {
        "questions": len(choice.calibrate) + len(choice.ask),
        "answered": choice.answered,
        "decisions": dict(sorted(decisions.items())),
        "target": config.target_agreement,
        "trust": asdict(choice.trust),
    }


def waiting_line(asked: Asked, missing: int, config: PeopleConfig, goes_on: bool = True) -> str:
    """What there is to do for people, in one line."""
    wanted = sum(asked.wanted.values())
    place = "Argilla" if config.labels == ARGILLA else config.labels
    if not wanted:
        return "people: there is nothing to ask; no prompt has two different answers and a judgment"
    if not missing:
        return f"people: all {wanted:,} answers are in {place}"
    given = f"people: {wanted - missing:,} of {wanted:,} answers are in {place}"
    if not goes_on and (until := asked.until(config)) is not None:
        given += f"; the dataset waits until {until:%Y-%m-%d %H:%M} UTC"
    todo = "label there" if config.labels == ARGILLA else "fill in its `verdict`"
    return f"{given}; {todo} and run the same again to take up new answers"


def routing_table(summary: Mapping[str, Any]) -> NamedTable:
    """The routes as a table for the card and the terminal."""
    decisions, trust = summary["decisions"], summary["trust"]
    routed = sum(decisions.values())
    kept = decisions.get("keep", 0)

    def share(count: int) -> str:
        return f"{count:,} ({count / routed:.1%})" if routed else f"{count:,}"

    threshold = "none found" if trust["threshold"] is None else f"P ≥ {trust['threshold']:.3f}"
    rows = (
        ("prompts that people could be asked about", f"{routed:,}"),
        ("questions", f"{summary['questions']:,}"),
        ("of them in the random slice", f"{decisions.get('calibrate', 0):,}"),
        ("answered", f"{summary['answered']:,}"),
        ("people agree with the judges, random slice", _part(trust["agreed"], trust["labels"])),
        ("agreement wanted where judges are trusted alone", f"{summary['target']:.0%}"),
        ("judges are trusted from", threshold),
        ("kept on the judges' word alone", share(kept)),
        ("unsure and not asked about", share(decisions.get("over_budget", 0))),
    )
    return NamedTable("People", ("", ""), rows, routing_note(trust))


def people_section(summary: Mapping[str, Any]) -> str:
    """The same for the card."""
    table = routing_table(summary)
    rows = [[what, value] for what, value in table.rows]
    return f"## {table.title}\n\n{markdown_table(['people', 'prompts'], rows)}\n\n{table.note}\n"


def routing_note(trust: Mapping[str, Any]) -> str:
    """What stands behind the threshold."""
    if trust["tested"] and trust["threshold"] is not None:
        return f"People's answers show the threshold, wrongly with a chance of {DELTA:.0%} at most."
    if trust["tested"]:
        return f"No prompt is kept on the judges' word alone: {trust['lacking']}."
    return f"The threshold is the recipe's and not shown by people: {trust['lacking']}."


def _part(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,}"
