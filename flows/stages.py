"""Each stage of a recipe, from the artifacts before it to its own, a shard at a time.

No algorithm is in here and no Prefect: a stage reads its shard from the store, calls the room that
knows how, and writes what comes back. `flows.build` makes these functions into tasks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from flows import labels
from flows.judges import calls, opened_judge
from flows.people import (
    questions_of,
    routing_summary,
    standings_of,
    waiting_line,
)
from flows.plan import engine_config
from flows.rankings import families, learn_scale
from flows.recipe import CandidateConfig, JudgeConfig
from flows.run import (
    Run,
    by_prompt,
    finish,
    groups,
    judged,
    owed_shards,
    prompts_of,
    work,
    write,
)
from generation.candidates import (
    ImportedCandidates,
    SampledCandidates,
    import_candidates,
    imported_prompts,
    parse_import,
    sample,
)
from generation.deferred import deferred
from generation.engine import EngineConfig
from generation.journalled import JournalledEngine
from generation.models import model_identity
from generation.opening import open_engine
from generation.prompts import load_prompts
from judging.agreement import agreement
from judging.calibration import Families
from judging.imported import ImportedJudgments, import_judgments, prompt_of_row
from judging.judge import Group
from judging.pairwise import ComparingJudge
from judging.people import NAME, Question, answers_on
from judging.ranking import rank
from judging.reward_model import RewardModelJudge
from judging.routing import Standing, choose, routes
from judging.schedule import PILOT, PILOT_CALLS
from preferences.fingerprint import fingerprint
from preferences.journal import Journal
from preferences.partition import Partition
from preferences.records import (
    Candidate,
    Dropped,
    Judgment,
    Prompt,
    Ranking,
    Route,
)
from preferences.sharing import work_through
from preferences.splits import require_both_sides
from preferences.store import Artifact, Shard, shards
from preferences.tables import read_rows
from training.saved_adapters import load_trained


def make_prompts(run: Run) -> None:
    """Load the prompts, keep the good ones, and decide on the shards."""
    recipe, artifact = run.plan.recipe, run.plan.prompts
    if run.store.manifest(artifact) is None:
        if recipe.prompts is not None:
            loaded = list(load_prompts(recipe.prompts))
        else:
            imports = [c for c in recipe.candidates if isinstance(c, ImportedCandidates)]
            loaded = list(imported_prompts(imports))
        kept = sorted((p for p in loaded if isinstance(p, Prompt)), key=lambda p: p.prompt_id)
        dropped = [p for p in loaded if isinstance(p, Dropped)]
        require_both_sides((p.prompt_id for p in kept), recipe.split, recipe.name)
        whole = Shard(0, 1)
        rows: list[Prompt | Dropped] = [*kept, *dropped]
        run.wrap("prompts", lambda s: run.store.write_part(artifact, s, Prompt, rows))(whole)
        finish(run, artifact, "prompts", [], [whole])
    count = run.store.count(artifact)
    run.shards = shards(count, recipe.runtime.shard_size)


def make_candidates(run: Run, number: int) -> None:
    """Have one source answer every prompt."""
    config, artifact = run.plan.recipe.candidates[number], run.plan.candidates[number]
    owed = owed_shards(run, artifact)
    if owed is None:
        return
    inputs = [run.plan.prompts]
    title = f"candidates: {config.name}"
    if isinstance(config, ImportedCandidates):
        rows = read_rows(config.source, config.split)

        def prompt_of(place: str, row: dict[str, Any]) -> str:
            return parse_import(config, place, row)[0].prompt_id

        with Partition(rows, prompt_of, run.shards) as partition:

            def take(shard: Shard) -> None:
                ids = frozenset(p.prompt_id for p in prompts_of(run, shard))
                taken = import_candidates(config, partition.rows(shard), ids)
                write(run, artifact, shard, Candidate, by_prompt(taken))

            work(run, artifact, title, inputs, owed, take)
        return
    _sample_candidates(run, config, artifact, title, owed)


def _sample_candidates(
    run: Run, config: SampledCandidates, artifact: Artifact, title: str, owed: list[Shard]
) -> None:
    identity = model_identity(engine_config(config))
    total = sum(len(prompts_of(run, shard)) for shard in owed) * config.samples
    with (
        run.progress.stage(title, total, "answers") as advance,
        deferred(
            lambda: open_engine(
                engine_config(config), run.engine_runtime(config.name), load_trained
            )
        ) as engine,
    ):

        def generate(shard: Shard) -> None:
            with Journal(run.store, identity, shard) as journal:
                remembering = JournalledEngine(engine, identity, journal, advance.reply)
                answers = sample(prompts_of(run, shard), config, identity, remembering)
            write(run, artifact, shard, Candidate, answers)

        work(run, artifact, title, [run.plan.prompts], owed, generate)


def make_judgments(run: Run, number: int) -> None:
    """Have one judge judge every group of candidates."""
    config, artifact = run.plan.recipe.judges[number], run.plan.judgments[number]
    owed = owed_shards(run, artifact)
    if owed is None:
        return
    title = f"judgments: {config.name}"
    inputs = list(run.plan.candidates)
    if isinstance(config, ImportedJudgments):
        source_ids = {
            name: p.prompt_id
            for p in run.store.read(run.plan.prompts, Prompt)
            for name in (p.prompt_id, p.source_id)
            if name is not None
        }
        rows = read_rows(config.source, config.split)

        def prompt_of(place: str, row: dict[str, Any]) -> str | None:
            return prompt_of_row(config, place, row, source_ids)

        with Partition(rows, prompt_of, run.shards) as partition:

            def take(shard: Shard) -> None:
                taken = import_judgments(config, partition.rows(shard), groups(run, shard))
                write(run, artifact, shard, Judgment, by_prompt(taken))

            work(run, artifact, title, inputs, owed, take)
        return
    total = sum(calls(config, group) for shard in owed for group in groups(run, shard))
    prior = run.plan.recipe.prior_of(config)

    def known(shard: Shard) -> list[Judgment]:
        return (
            [] if prior is None else run.store.read_part(run.plan.judgments[prior], shard, Judgment)
        )

    runtime = run.engine_runtime(config.name)
    pilot = _pilot(run) if isinstance(config, ComparingJudge) else []
    with (
        run.progress.stage(title, total, "judgments") as advance,
        opened_judge(config, runtime, run.store, advance, pilot, known) as judge_for,
    ):

        def judge(shard: Shard) -> None:
            with judge_for(shard) as ask:
                write(run, artifact, shard, Judgment, ask(groups(run, shard)))

        work(run, artifact, title, inputs, owed, judge)


def _pilot(run: Run) -> list[tuple[Shard, list[Group]]]:
    """The first prompts that leave a choice of what to compare, however the shards are cut."""
    pilot, prompts, asked = [], 0, 0
    for shard in run.shards:
        found = []
        for group in groups(run, shard):
            size = len(group.candidates)
            if size > 2 and prompts < PILOT and asked < PILOT_CALLS:
                found.append(group)
                prompts, asked = prompts + 1, asked + size * (size - 1)
        if found:
            pilot.append((shard, found))
        if prompts == PILOT or asked >= PILOT_CALLS:
            break
    return pilot


def make_answers(run: Run) -> None:
    """Take what people have said so far, where the recipe asks them."""
    artifact, first = run.plan.answers, run.shards[0]
    if artifact is None or (owed := owed_shards(run, artifact)) is None:
        return

    def take(shard: Shard) -> None:
        # What names no prompt has to be dropped somewhere.
        given = run.plan.given
        here = [a for a in given if (a.prompt_id in shard if a.prompt_id else shard == first)]
        write(run, artifact, shard, Judgment, answers_on(groups(run, shard), here))

    work(run, artifact, f"judgments: {NAME}", list(run.plan.candidates), owed, take)


def make_routes(run: Run) -> None:
    """Decide which prompts are put to people, and which the judges are trusted with."""
    people, artifact = run.plan.recipe.people, run.plan.routes
    if people is None or artifact is None or (owed := owed_shards(run, artifact)) is None:
        return
    noise = learn_scale(lambda: judged(run), Families(), has_people=False).noise

    def standing(shard: Shard) -> Iterator[Standing]:
        return standings_of(list(judged(run, [shard])), noise, people)

    choice = choose((s for shard in run.shards for s in standing(shard)), people)

    def route(shard: Shard) -> None:
        write(run, artifact, shard, Route, routes(standing(shard), choice, people.answers))

    work_through(run.store, artifact, owed, run.wrap("routes", route))
    decisions = Counter(r.decision for r in run.store.read(artifact, Route))
    summary = routing_summary(choice, decisions, people)
    finish(run, artifact, "routes", run.plan.said, run.shards, summary)


def ask_people(run: Run) -> bool:
    """Put the questions to people, and tell how many are open; whether to go on without them."""
    recipe, artifact = run.plan.recipe, run.plan.routes
    manifest = run.store.manifest(artifact) if artifact else None
    if recipe.people is None or artifact is None or manifest is None:
        return True
    questions = open_questions(run, artifact)
    judgments = fingerprint([str(j) for j in run.plan.judgments])
    asked = labels.ask(recipe, run.store, judgments, questions)
    missing = asked.missing(run.plan.given)
    goes_on = not missing or labels.is_over(recipe, asked)
    run.progress.say(waiting_line(asked, missing, recipe.people, goes_on))
    if goes_on:
        labels.end_wait(recipe, run.store, asked)
    return goes_on


def open_questions(run: Run, routed: Artifact) -> list[Question]:
    """All that people are asked, answered or not."""
    return [
        question
        for shard in run.shards
        for question in questions_of(
            judged(run, [shard]), run.store.read_part(routed, shard, Route)
        )
    ]


def make_rankings(run: Run) -> None:
    """Fit each prompt's ranking to what all judges said, and to what people said of them."""
    owed = owed_shards(run, run.plan.rankings)
    if owed is None:
        return
    recipe = run.plan.recipe
    told = families(_models(recipe.judges).values(), _models(recipe.candidates))
    has_people = recipe.people is not None or any(
        isinstance(j, ImportedJudgments) and j.people for j in recipe.judges
    )
    scale = learn_scale(lambda: judged(run), told, has_people)
    calibration = scale.calibrated.calibration if scale.calibrated else None

    def fit(shard: Shard) -> None:
        said = [j for a in run.plan.said for j in run.store.read_part(a, shard, Judgment)]
        ranked = rank(groups(run, shard), said, scale.noise, calibration, told)
        write(run, run.plan.rankings, shard, Ranking, ranked)

    work_through(run.store, run.plan.rankings, owed, run.wrap("rankings", fit))
    found = agreement(judged(run), _models(recipe.judges), _models(recipe.candidates))
    summary = {"agreement": asdict(found), **scale.summary()}
    inputs = [*run.plan.candidates, *run.plan.said]
    finish(run, run.plan.rankings, "rankings", inputs, run.shards, summary)


def _models(configs: Iterable[JudgeConfig | CandidateConfig]) -> dict[str, str]:
    """The model of each that has one, by the name the recipe gives it."""
    return {c.name: c.model for c in configs if isinstance(c, EngineConfig | RewardModelJudge)}
