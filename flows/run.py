"""A recipe being carried out: what its stages read and write, a shard at a time."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from flows.plan import Plan
from flows.progress import Progress
from generation.engine import EngineRuntime
from judging.agreement import JudgeFacts, judge_facts
from judging.judge import Group
from judging.missing import ALARM, missing_judgments
from preferences.records import (
    Candidate,
    Dropped,
    Judgment,
    Prompt,
    RecordT,
)
from preferences.sharing import work_through
from preferences.store import Artifact, Manifest, Shard, Store

Make = Callable[[Shard], Any]
"""Makes one shard of an artifact."""
Wrap = Callable[[str, Make], Make]
"""Turns a stage's function into a task; the identity where there is no Prefect."""


@dataclass
class Run:
    """A recipe being carried out: its plan, its store, and who is told how it goes."""

    plan: Plan
    store: Store
    progress: Progress
    wrap: Wrap = lambda name, make: make
    shards: Sequence[Shard] = field(default_factory=list)

    def engine_runtime(self, name: str) -> EngineRuntime:
        """Where and how the engine of these candidates or of this judge runs."""
        return self.plan.recipe.runtime.engines.get(name, EngineRuntime())


def groups(run: Run, shard: Shard) -> list[Group]:
    """A shard's prompts with the candidates that can be judged: those that say something."""
    by_prompt: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in candidates_of(run, shard):
        if candidate.status in ("complete", "truncated"):
            by_prompt[candidate.prompt_id].append(candidate)
    return [Group(p, tuple(by_prompt[p.prompt_id])) for p in prompts_of(run, shard)]


def candidates_of(run: Run, shard: Shard) -> Iterator[Candidate]:
    """A shard's candidates from every source, each once: sources can overlap."""
    seen: set[str] = set()
    for artifact in run.plan.candidates:
        for candidate in run.store.read_part(artifact, shard, Candidate):
            if candidate.candidate_id not in seen:
                seen.add(candidate.candidate_id)
                yield candidate


def judged(
    run: Run, parts: Sequence[Shard] | None = None
) -> Iterator[tuple[Group, list[Judgment]]]:
    """Every group, or those of some shards, with what all judges and people said about it."""
    for shard in run.shards if parts is None else parts:
        said: dict[str, list[Judgment]] = defaultdict(list)
        for artifact in run.plan.said:
            for judgment in run.store.read_part(artifact, shard, Judgment):
                said[judgment.prompt_id].append(judgment)
        for group in groups(run, shard):
            yield group, said[group.prompt.prompt_id]


def prompts_of(run: Run, shard: Shard) -> list[Prompt]:
    return run.store.read_part(run.plan.prompts, shard, Prompt)


def by_prompt(rows: Iterable[RecordT | Dropped]) -> list[RecordT | Dropped]:
    """Imported rows in the order of their prompts, so that parts join the same however cut."""
    return sorted(rows, key=lambda row: row.prompt_id)


def write(
    run: Run,
    artifact: Artifact,
    shard: Shard,
    record: type[RecordT],
    rows: Iterable[RecordT | Dropped],
) -> None:
    run.store.write_part(artifact, shard, record, rows)


def owed_shards(run: Run, artifact: Artifact) -> list[Shard] | None:
    """The shards still to be made; None where the artifact is finished."""
    if run.store.manifest(artifact) is not None:
        return None
    return [shard for shard in run.shards if not run.store.has_part(artifact, shard)]


def work(
    run: Run, artifact: Artifact, name: str, inputs: list[Artifact], owed: list[Shard], make: Make
) -> None:
    work_through(run.store, artifact, owed, run.wrap(name, make))
    finish(run, artifact, name, inputs, run.shards)


def finish(
    run: Run,
    artifact: Artifact,
    name: str,
    inputs: list[Artifact],
    made: Sequence[Shard],
    told: Mapping[str, Any] | None = None,
) -> None:
    reasons = Counter(d.reason for d in run.store.read(artifact, Dropped, kind="dropped"))
    summary: dict[str, Any] = {"dropped": dict(sorted(reasons.items())), **(told or {})}
    if artifact.stage == "judgments":
        facts = judge_facts(run.store.read(artifact, Judgment))
        summary["judge"] = asdict(facts)
        if sum(facts.failures.values()) > ALARM * facts.judgments:
            summary["alarms"] = _alarms(run, artifact, facts)
            for alarm in summary["alarms"]:
                run.progress.say(f"! {alarm}")
    manifest = Manifest(
        stage=artifact.stage,
        fingerprint=artifact.fingerprint,
        name=name,
        rows=run.store.count(artifact),
        dropped=sum(reasons.values()),
        parts=tuple(f"part-{shard.suffix}.parquet" for shard in made),
        inputs=tuple(str(i) for i in inputs),
        summary=summary,
    )
    run.store.finish(artifact, manifest)
    run.progress.finished(manifest)


MOST_MISSING = 20_000
"""Judgments looked at for whether the missing ones differ; more would tell no more."""


def _alarms(run: Run, artifact: Artifact, facts: JudgeFacts) -> list[str]:
    """What there is to say of a judge of which too much is missing."""
    judgments: list[Judgment] = []
    candidates: dict[str, Candidate] = {}
    prompts: dict[str, Prompt] = {}
    # Every so many prompts of all shards: an endpoint can go down half-way.
    one_in = facts.judgments // MOST_MISSING + 1
    for shard in run.shards:
        kept = {
            p.prompt_id: p for p in prompts_of(run, shard) if int(p.prompt_id, 16) % one_in == 0
        }
        said = run.store.read_part(artifact, shard, Judgment)
        judgments += [j for j in said if j.prompt_id in kept]
        candidates |= {c.candidate_id: c for c in candidates_of(run, shard) if c.prompt_id in kept}
        prompts |= kept
    found = missing_judgments(judgments, candidates, prompts)
    if len(found) == 1:
        # The figures are of all judgments, and only whether the missing differ of the sample.
        total = sum(facts.failures.values())
        reasons = dict(sorted(facts.failures.items(), key=lambda reason: -reason[1]))
        found = [replace(found[0], judgments=facts.judgments, missing=total, reasons=reasons)]
    return [sentence for missing in found if (sentence := missing.sentence()) is not None]
