"""The evaluation stage: the aligned model against the one it came from, on held-out prompts.

That is the model which the first step started from, or, without steps, the alignment: what counts
is the way as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flows.chain import handed_on, located
from flows.children import in_child
from flows.judges import opened_judge
from flows.measuring import EvaluationConfig
from flows.plan import engine_config, training_artifacts
from flows.progress import Progress
from flows.recipe import Recipe
from flows.steps import ALIGNMENT
from flows.train import local_folder
from generation.candidates import SampledCandidates, sample
from generation.deferred import deferred
from generation.engine import EngineRuntime
from generation.journalled import JournalledEngine
from generation.models import model_identity
from generation.opening import open_engine
from generation.prompts import load_prompts
from judging.judge import Group
from judging.verifier import load_check
from judging.win_rate import length_controlled_win_rates, win_probabilities
from preferences.conversations import make_prompt
from preferences.estimate import Estimate, bounded_mean, clustered_mean
from preferences.journal import Journal
from preferences.records import Candidate, Judgment, Prompt, Triplet
from preferences.store import Artifact, Manifest, Shard, Store
from training.adapters import NOT_MERGED
from training.evaluation import OwnAnswer, Policy, log_ratios
from training.saved_adapters import load_trained

WHOLE = Shard(0, 1)


def evaluate(
    recipe: Recipe,
    store: Store,
    dataset: Artifact,
    model: Artifact,
    evaluation: Artifact,
    progress: Progress,
) -> None:
    """Answer held-out prompts with both models, compare the answers, and write the figures."""
    if store.manifest(evaluation) is not None:
        return
    config = recipe.evaluation
    assert config is not None
    prompts = _prompts(config, store, dataset)
    engine, reason = engine_of(recipe)
    if reason is not None:
        progress.say(f"  evaluation: {engine} answers for both models; {reason}")
    before_model, revision = recipe.model_before()
    with _aligned(recipe, store, dataset) as policy:
        adapter = str(policy.adapter) if policy.adapter else None
        sources = [
            _source(config, engine, "before", before_model, revision, None),
            _source(config, engine, "after", policy.model, policy.revision, adapter),
        ]
        runtime = recipe.runtime.engines.get("policy", EngineRuntime())
        before, after = (_answers(s, prompts, store, runtime, progress) for s in sources)
        kl = _kl(recipe, policy, prompts, after)
    groups = [
        Group(prompts[number // config.samples], (ours, theirs))
        for number, (ours, theirs) in enumerate(zip(after, before, strict=True))
    ]
    judgments = _judgments(recipe, store, groups, progress)
    store.write_part(evaluation, WHOLE, Candidate, [*before, *after])
    with store.staged(f"{store.folder(evaluation)}/judgments.parquet") as temporary:
        store.write_rows(temporary, Judgment, iter(judgments))
    judge = recipe.askable_judge()
    told = [g for g in groups if _can_be_judged(g)]
    wins = win_probabilities(told, judgments)
    # Of one model against one: a single entry, or none where nothing could be judged.
    at_equal_lengths = [r.controlled for r in length_controlled_win_rates(told, wins)]
    summary: dict[str, Any] = {
        "prompts": len(prompts),
        "checks": {
            name: [_checked(check, prompts, config, answers) for answers in (before, after)]
            for name, check in config.checks.items()
        },
        "truncated": [_share(a, lambda c: c.status == "truncated") for a in (before, after)],
        "characters": [sum(len(c.response) for c in a) / len(a) for a in (before, after)],
        "kl": _asdict(kl),
        "judge": judge.name if judge else None,
        "win_rate": _asdict(_win_rate(told, wins)),
        "win_rate_at_equal_lengths": _asdict(next(iter(at_equal_lengths), None)),
    }
    manifest = Manifest(
        stage=evaluation.stage,
        fingerprint=evaluation.fingerprint,
        name=f"{recipe.name} evaluated",
        rows=len(before) + len(after),
        dropped=len(groups) - len(told),
        parts=(f"part-{WHOLE.suffix}.parquet", "judgments.parquet"),
        inputs=(str(model), str(dataset)),
        config=recipe.model_dump(mode="json", include={"evaluation"}),
        summary=summary,
    )
    store.finish(evaluation, manifest)
    progress.finished(manifest)


def engine_of(recipe: Recipe) -> tuple[str, str | None]:
    """What answers in a recipe's evaluation, and, where that is not what the recipe says, why."""
    config, weights = recipe.evaluation, recipe.trainings[ALIGNMENT].weights
    assert config is not None
    if config.engine == "transformers" or weights not in NOT_MERGED:
        return config.engine, None
    return "transformers", f"{weights} cannot be merged ({NOT_MERGED[weights]}), as vLLM needs it"


@contextmanager
def _aligned(recipe: Recipe, store: Store, dataset: Artifact) -> Iterator[Policy]:
    """The trained model as its engine takes it: merged, or an adapter that the engine puts on."""
    trained = training_artifacts(recipe, dataset)
    weights = recipe.trainings[ALIGNMENT].weights
    if weights != "lora" and weights not in NOT_MERGED:
        yield Policy(str(handed_on(recipe, store, trained)))
        return
    base = located(recipe, store, trained).config
    with local_folder(store, trained[ALIGNMENT]) as folder:
        yield Policy(base.model, base.revision, folder / "adapter")


def _kl(
    recipe: Recipe, policy: Policy, prompts: Sequence[Prompt], answers: Sequence[Candidate]
) -> Estimate | None:
    """KL of the policy, in nats an answer, from the model that the recipe names or began with; None
    where answers are not drawn from the whole distribution."""
    config = recipe.evaluation
    assert config is not None
    if not config.measures_kl:
        return None
    far = config.kl_reference
    reference = Policy(*((far.model, far.revision) if far else recipe.model_before()))
    given = [
        (c.prompt_id, OwnAnswer(prompts[n // config.samples].messages, c.response, _ended(c)))
        for n, c in enumerate(answers)
        if c.status != "failed"
    ]
    dtype, temperature = recipe.trainings[ALIGNMENT].dtype, config.sampling.temperature
    told = [answer for _, answer in given]
    ratios = in_child("measuring the KL", log_ratios, policy, reference, told, dtype, temperature)
    pairs = zip(given, ratios, strict=True)
    return clustered_mean((prompt_id, r) for (prompt_id, _), r in pairs if r is not None)


def _ended(answer: Candidate) -> bool:
    return answer.status != "truncated"


def _prompts(config: EvaluationConfig, store: Store, dataset: Artifact) -> list[Prompt]:
    if config.prompts is not None:
        found = [p for p in load_prompts(config.prompts) if isinstance(p, Prompt)]
    else:
        held_out = store.read(dataset, Triplet, kind="data/test")
        found = [make_prompt(t.prompt, "held-out prompt") for t in held_out]
    unique = {p.prompt_id: p for p in found}
    return [unique[prompt_id] for prompt_id in sorted(unique)]


def _source(
    config: EvaluationConfig,
    engine: str,
    name: str,
    model: str,
    revision: str | None,
    adapter: str | None,
) -> SampledCandidates:
    return SampledCandidates.model_validate(
        {
            "kind": "sample",
            "name": name,
            "engine": engine,
            "model": model,
            "revision": None if Path(model).is_dir() else revision,
            "adapter": adapter,
            "samples": config.samples,
            "sampling": config.sampling,
            "seed": config.seed,
        }
    )


def _answers(
    source: SampledCandidates,
    prompts: Sequence[Prompt],
    store: Store,
    runtime: EngineRuntime,
    progress: Progress,
) -> list[Candidate]:
    identity = model_identity(engine_config(source))
    total = len(prompts) * source.samples
    with (
        progress.stage(f"evaluation: answers {source.name}", total, "answers") as advance,
        deferred(lambda: open_engine(engine_config(source), runtime, load_trained)) as engine,
        Journal(store, identity, WHOLE) as journal,
    ):
        remembering = JournalledEngine(engine, identity, journal, advance.reply)
        return sample(prompts, source, identity, remembering)


def _judgments(
    recipe: Recipe, store: Store, groups: Sequence[Group], progress: Progress
) -> list[Judgment]:
    config = recipe.askable_judge()
    if config is None:
        return []
    told = [g for g in groups if _can_be_judged(g)]
    runtime = recipe.runtime.engines.get(config.name, EngineRuntime())
    with (
        progress.stage("evaluation: judgments", 2 * len(told), "judgments") as advance,
        opened_judge(config, runtime, store, advance) as judge_for,
        judge_for(WHOLE) as ask,
    ):
        return list(ask(told))


def _can_be_judged(group: Group) -> bool:
    return all(c.status in ("complete", "truncated") for c in group.candidates)


def _checked(
    check: str, prompts: Sequence[Prompt], config: EvaluationConfig, answers: Sequence[Candidate]
) -> dict[str, Any] | None:
    score = load_check(check)
    scores = [
        (answer.prompt_id, float(score(prompts[number // config.samples], answer.response)))
        for number, answer in enumerate(answers)
    ]
    is_share = {value for _, value in scores} <= {0.0, 1.0}
    return _asdict(bounded_mean(scores) if is_share else clustered_mean(scores))


def _win_rate(groups: Sequence[Group], wins: Sequence[float | None]) -> Estimate | None:
    """The mean win probability, with an interval that few prompts leave wide."""
    found = zip(groups, wins, strict=True)
    return bounded_mean((g.prompt.prompt_id, won) for g, won in found if won is not None)


def _share(answers: Sequence[Candidate], holds: Callable[[Candidate], bool]) -> float:
    return sum(map(holds, answers)) / len(answers)


def _asdict(estimate: Any) -> dict[str, Any] | None:
    return None if estimate is None else asdict(estimate)
