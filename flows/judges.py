"""The judges of a recipe, opened: from a configuration to something that can be asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache, partial

from flows.plan import engine_config, judge_identity
from flows.progress import Advance
from flows.recipe import AskableJudge, JudgeConfig
from generation.deferred import deferred
from generation.engine import Engine, EngineConfig, EngineRuntime
from generation.journalled import JournalledEngine
from generation.models import model_identity, weights_identity
from generation.opening import open_engine
from judging.imported import ImportedJudgments
from judging.judge import Group, Judge
from judging.listwise import ListwiseJudge, listwise, orders_shown
from judging.pairwise import ComparingJudge, PairwiseJudge, by_letter, scheduled
from judging.pointwise import PointwiseJudge, pointwise
from judging.prior import Prior, prior
from judging.reasoned import ReasonedPairwiseJudge, by_reasoning
from judging.reward_model import RewardModelJudge, open_reward_model, reward_model
from judging.rubric import LABELS, load_rubric
from judging.schedule import (
    Compare,
    Guide,
    Schedule,
    adaptive,
    all_pairs,
    carry_out,
    knockout,
    learn_guide,
    piloted,
)
from judging.verifier import Verifier, verifier
from preferences.fingerprint import fingerprint
from preferences.journal import Journal
from preferences.records import Judgment
from preferences.store import Shard, Store
from training.saved_adapters import load_trained

JudgeFor = Callable[[Shard], AbstractContextManager[Judge]]
"""The judge for one shard, with the shard's journal."""
Pilot = Sequence[tuple[Shard, Sequence[Group]]]
"""Groups to be judged in full before the others, by shard."""
Known = Callable[[Shard], Sequence[Judgment]]
"""What the judge named as prior has said."""


@contextmanager
def opened_judge(
    config: AskableJudge | Prior,
    runtime: EngineRuntime,
    store: Store,
    advance: Advance,
    pilot: Pilot = (),
    known: Known = lambda shard: (),
) -> Iterator[JudgeFor]:
    """A judge whose model is loaded when it is first needed, and gone at the end of the block."""
    with ExitStack() as stack:
        match config:
            case PairwiseJudge() | ReasonedPairwiseJudge():
                engine_for = _engine(stack, config, runtime, store, advance)
                yield _comparing(config, engine_for, store, advance, pilot, known)
            case PointwiseJudge() | ListwiseJudge():
                yield _asking(config, _engine(stack, config, runtime, store, advance))
            case RewardModelJudge():
                yield _reward_model(stack, config, store, advance)
            case Verifier():
                yield _plain(verifier(config, fingerprint(judge_identity(config))), advance)
            case Prior():
                yield _plain(prior(config), advance)


def calls(config: JudgeConfig, group: Group) -> int:
    """How often a judge is asked about a group, if it is understood: for progress and estimates."""
    size = len(group.candidates)
    match config:
        case PairwiseJudge():
            return _comparisons(config, size)
        case ReasonedPairwiseJudge():
            return _comparisons(config, size) * config.samples
        case PointwiseJudge():
            return size * len(config.criteria)
        case ListwiseJudge():
            return len(orders_shown(group, config.rounds)) if 1 < size <= len(LABELS) else 0
        case Prior():
            models = [c.model for c in group.candidates if c.model in config.order]
            same = sum(models.count(m) * (models.count(m) - 1) // 2 for m in set(models))
            return len(models) * (len(models) - 1) // 2 - same
        case ImportedJudgments():
            return 0
        case _:
            return size


def _comparisons(config: ComparingJudge, size: int) -> int:
    every = size * (size - 1)
    # An adaptive schedule asks about two calls an answer: simulated, 12 of the 30 for six.
    guesses = {"all_pairs": every, "knockout": 2 * max(size - 1, 0), "adaptive": 2 * size}
    return min(every, guesses[config.schedule])


EngineFor = Callable[[Shard], AbstractContextManager[tuple[str, Engine]]]
"""The engine for one shard, with the shard's journal, and its identity."""


def _engine(
    stack: ExitStack, config: EngineConfig, runtime: EngineRuntime, store: Store, advance: Advance
) -> EngineFor:
    identity = model_identity(engine_config(config))
    engine = stack.enter_context(
        deferred(lambda: open_engine(engine_config(config), runtime, load_trained))
    )

    @contextmanager
    def engine_for(shard: Shard) -> Iterator[tuple[str, Engine]]:
        with Journal(store, identity, shard) as journal:
            yield identity, JournalledEngine(engine, identity, journal, advance.reply)

    return engine_for


def _asking(config: PointwiseJudge | ListwiseJudge, engine_for: EngineFor) -> JudgeFor:
    rubrics = {
        name: load_rubric(name, config.kind)
        for name in (config.criteria if isinstance(config, PointwiseJudge) else (config.rubric,))
    }

    @contextmanager
    def judge_for(shard: Shard) -> Iterator[Judge]:
        with engine_for(shard) as (identity, engine):
            if isinstance(config, PointwiseJudge):
                yield pointwise(config, rubrics, identity, engine)
            else:
                yield listwise(config, rubrics[config.rubric], identity, engine)

    return judge_for


def _comparing(
    config: PairwiseJudge | ReasonedPairwiseJudge,
    engine_for: EngineFor,
    store: Store,
    advance: Advance,
    pilot: Pilot,
    known: Known,
) -> JudgeFor:
    rubric = load_rubric(config.rubric, config.kind)
    piloting = {group.prompt.prompt_id for _, groups in pilot for group in groups}

    def compare(identity: str, engine: Engine) -> Compare:
        if isinstance(config, PairwiseJudge):
            return by_letter(config, rubric, identity, engine)
        return by_reasoning(config, rubric, identity, engine)

    @cache
    def guide() -> Guide:
        said: list[Judgment] = []
        with _held(store, f"pilot-{fingerprint(judge_identity(config))}"):
            for shard, groups in pilot:
                before = advance.done
                with engine_for(shard) as (identity, engine):
                    said += carry_out(all_pairs(groups), compare(identity, engine))
                advance.comes_again(advance.done - before)
                said += [j for j in known(shard) if j.prompt_id in piloting]
        return learn_guide([g for _, groups in pilot for g in groups], said, config.name)

    def schedule_for(shard: Shard) -> Schedule:
        if config.schedule != "adaptive":
            return all_pairs if config.schedule == "all_pairs" else knockout
        others = partial(
            adaptive,
            # Before the shard's journal is opened, so that it holds what the pilot asked.
            guide=guide() if pilot else Guide(judge=config.name),
            min_gain=config.min_gain,
            worst=config.worst,
            known=known(shard),
        )
        return partial(piloted, pilot=piloting, others=others)

    @contextmanager
    def judge_for(shard: Shard) -> Iterator[Judge]:
        schedule = schedule_for(shard)
        with engine_for(shard) as (identity, engine):
            yield scheduled(compare(identity, engine), schedule)

    return judge_for


@contextmanager
def _held(store: Store, key: str) -> Iterator[None]:
    """Alone among all processes on the store: the others find in the journal what we asked."""
    while True:
        with store.claim(key) as ours:
            if ours:
                yield
                return
        time.sleep(0.2)


def _reward_model(
    stack: ExitStack, config: RewardModelJudge, store: Store, advance: Advance
) -> JudgeFor:
    identity = fingerprint([weights_identity(config.model, config.revision), config.dtype])
    score = stack.enter_context(open_reward_model(config))

    @contextmanager
    def judge_for(shard: Shard) -> Iterator[Judge]:
        with Journal(store, identity, shard) as journal:
            yield _counted(reward_model(config, identity, score, journal), advance)

    return judge_for


def _plain(judge: Judge, advance: Advance) -> JudgeFor:
    @contextmanager
    def judge_for(shard: Shard) -> Iterator[Judge]:
        yield _counted(judge, advance)

    return judge_for


def _counted(judge: Judge, advance: Advance) -> Judge:
    def ask(groups: Iterable[Group]) -> Iterator[Judgment]:
        for judgment in judge(groups):
            advance.by(1)
            yield judgment

    return ask
