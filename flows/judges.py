"""The judges of a recipe, opened: from a configuration to something that can be asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from flows.plan import engine_config, judge_identity
from flows.progress import Advance
from flows.recipe import AskableJudge, JudgeConfig
from generation.deferred import deferred
from generation.engine import EngineRuntime
from generation.journalled import JournalledEngine
from generation.models import model_identity, weights_identity
from generation.opening import open_engine
from judging.imported import ImportedJudgments
from judging.judge import Group, Judge
from judging.pairwise import PairwiseJudge, pairwise
from judging.prior import Prior, prior
from judging.reward_model import RewardModelJudge, open_reward_model, reward_model
from judging.rubric import load_rubric
from judging.verifier import Verifier, verifier
from preferences.fingerprint import fingerprint
from preferences.journal import Journal
from preferences.records import Judgment
from preferences.store import Shard, Store

JudgeFor = Callable[[Shard], AbstractContextManager[Judge]]
"""The judge for one shard, with the shard's journal."""


@contextmanager
def opened_judge(
    config: AskableJudge | Prior, runtime: EngineRuntime, store: Store, advance: Advance
) -> Iterator[JudgeFor]:
    """A judge whose model is loaded when it is first needed, and gone at the end of the block."""
    with ExitStack() as stack:
        match config:
            case PairwiseJudge():
                yield _pairwise(stack, config, runtime, store, advance)
            case RewardModelJudge():
                yield _reward_model(stack, config, store, advance)
            case Verifier():
                yield _plain(verifier(config, fingerprint(judge_identity(config))), advance)
            case Prior():
                yield _plain(prior(config), advance)


def calls(config: JudgeConfig, group: Group) -> int:
    """How many judgments a judge gives on a group: for progress and estimates."""
    size = len(group.candidates)
    match config:
        case PairwiseJudge():
            return size * (size - 1)
        case Prior():
            models = [c.model for c in group.candidates if c.model in config.order]
            same = sum(models.count(m) * (models.count(m) - 1) // 2 for m in set(models))
            return len(models) * (len(models) - 1) // 2 - same
        case ImportedJudgments():
            return 0
        case _:
            return size


def _pairwise(
    stack: ExitStack, config: PairwiseJudge, runtime: EngineRuntime, store: Store, advance: Advance
) -> JudgeFor:
    rubric = load_rubric(config.rubric)
    identity = model_identity(engine_config(config))
    engine = stack.enter_context(deferred(lambda: open_engine(engine_config(config), runtime)))

    @contextmanager
    def judge_for(shard: Shard) -> Iterator[Judge]:
        with Journal(store, identity, shard) as journal:
            remembering = JournalledEngine(engine, identity, journal, advance.reply)
            yield pairwise(config, rubric, identity, remembering)

    return judge_for


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
