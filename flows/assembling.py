"""The last stages of a build: rankings become pairs, and pairs with their texts the dataset.

They call no model, so they are what several processes can share.
"""

from __future__ import annotations

from dataclasses import asdict

import pyarrow as pa

from flows.cores import work_together
from flows.people import people_section
from flows.run import Make, Run, candidates_of, finish, owed_shards, write
from judging.calibration import Isotonic
from judging.ranking import win_probability
from preferences.assembly import WinProbability, assemble, triplets
from preferences.card import dataset_card, dataset_facts
from preferences.errors import InputError
from preferences.records import Candidate, Preference, Prompt, Ranking, Triplet
from preferences.reliability import reliability_diagram
from preferences.splits import side
from preferences.store import Manifest, Shard

SIDES = ("train", "test")
AFTER = ("dataset", "alignment", "evaluation")


def make_preferences(run: Run) -> None:
    """Pair the candidates by the recipe's policy."""
    artifact = run.plan.preferences
    if (owed := owed_shards(run, artifact)) is None:
        return
    work_together(run, artifact, "preferences", owed, _pairing)
    finish(run, artifact, "preferences", [run.plan.rankings], run.shards)


def _pairing(run: Run) -> Make:
    probability = _probability(run)

    def pair(shard: Shard) -> None:
        rankings = run.store.read_part(run.plan.rankings, shard, Ranking)
        candidates = {c.candidate_id: c for c in candidates_of(run, shard)}
        made = assemble(rankings, candidates, run.plan.recipe.pairs, probability)
        write(run, run.plan.preferences, shard, Preference, made)

    return pair


def _probability(run: Run) -> WinProbability:
    """The ranking's own, or what the isotonic regression on people's labels makes of it."""
    rankings = run.store.manifest(run.plan.rankings)
    calibration = rankings.summary.get("calibration") if rankings else None
    if run.plan.recipe.calibration == "logistic" or calibration is None:
        return win_probability
    steps = Isotonic(**{name: tuple(of) for name, of in calibration["steps"].items()})
    return lambda ranking, one, other: float(steps(win_probability(ranking, one, other)))


def make_dataset(run: Run, recipe_text: str) -> None:
    """Put texts to the preferences and split them by prompt; write the card."""
    recipe, artifact = run.plan.recipe, run.plan.dataset
    if run.store.manifest(artifact) is not None:
        return
    folder = run.store.folder(artifact)
    # The test file is written last, so it says that the shard is done.
    owed = [s for s in run.shards if not run.store.has_part(artifact, s, "data/test")]
    work_together(run, artifact, "dataset", owed, _joining, "data/test")
    sides = {split: dataset_facts(run.store.tables(artifact, f"data/{split}")) for split in SIDES}
    for split, facts in sides.items():
        if facts is None:
            raise InputError(
                f"{recipe.name}: no pair is left for the {split} split; lower "
                f"`pairs.min_probability`, add prompts or change `split.test: {recipe.split.test}`"
            )
    made = (a for _, a in run.plan.artifacts if a.stage not in AFTER)
    before = [m for a in made if (m := run.store.manifest(a)) is not None]
    card = dataset_card(recipe.name, recipe.description, recipe.license, sides, before, recipe_text)
    routed = run.store.manifest(run.plan.routes) if run.plan.routes else None
    if routed is not None:
        card += f"\n{people_section(routed.summary)}"
    run.store.write_text(f"{folder}/README.md", card)
    rankings = run.store.manifest(run.plan.rankings)
    if rankings and (diagram := reliability_diagram(rankings.summary)) is not None:
        run.store.write_text(f"{folder}/reliability.svg", diagram)
    manifest = Manifest(
        stage=artifact.stage,
        fingerprint=artifact.fingerprint,
        name=recipe.name,
        rows=sum(facts.rows for facts in sides.values() if facts),
        dropped=sum(m.dropped for m in before),
        parts=tuple(f"data/{x}-{shard.suffix}.parquet" for x in SIDES for shard in run.shards),
        inputs=tuple(f"{m.stage}/{m.fingerprint}" for m in before),
        config=recipe.model_dump(mode="json", exclude={"runtime"}),
        summary={split: asdict(facts) for split, facts in sides.items() if facts},
    )
    run.store.finish(artifact, manifest)
    run.progress.finished(manifest)


def _joining(run: Run) -> Make:
    plan, store = run.plan, run.store
    folder = store.folder(plan.dataset)

    def join(shard: Shard) -> None:
        answers = [store.part_table(a, shard, Candidate) for a in plan.candidates]
        table = triplets(
            store.part_table(plan.preferences, shard, Preference),
            store.part_table(plan.prompts, shard, Prompt),
            pa.concat_tables(answers),
        )
        sides = [side(prompt_id, plan.recipe.split) for prompt_id in table["prompt_id"].to_pylist()]
        for split in SIDES:
            rows = table.filter(pa.array([s == split for s in sides], pa.bool_()))
            with store.staged(f"{folder}/data/{split}-{shard.suffix}.parquet") as temporary:
                store.write_tables(temporary, Triplet, [rows] if len(rows) else [])

    return join
