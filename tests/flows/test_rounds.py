"""Rounds: when they end, which one is kept, what each starts from, and that none is done twice."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flows.labels import plan_with_answers
from flows.measuring import RoundsConfig
from flows.plan import make_plan
from flows.recipe import Recipe, load_recipe
from flows.rounds import Round, go_round, round_recipe, rounds_of, rounds_table, verdict
from generation.candidates import SampledCandidates
from preferences.errors import InputError
from preferences.store import Manifest, Store
from tests.flows.test_recipe import MINIATURE, recipe

POLICY = str(MINIATURE / "policy")
BLIND = {"probe": None, "max_steps": 2, "weights": "full"}
SAMPLED = {"kind": "sample", "name": "policy", "model": POLICY, "seed": 5}
OTHERS = [
    {"kind": "import", "name": "answers", "source": "answers.jsonl"},
    {"kind": "sample", "name": "far", "engine": "openai", "model": "m"},
]
CHECK = {"kind": "verifier", "name": "check", "check": "regex", "pattern": "a"}


def going_round(folder: Path, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "candidates": [SAMPLED, *OTHERS],
        "judges": [CHECK],
        "alignment": {"model": POLICY, **BLIND},
        "evaluation": {},
        **changes,
    }
    return load_recipe(recipe(folder, **values))


def estimated(mean: float, half: float = 0.05) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "clusters": 40}


def rounds(wins: Sequence[float], far: Sequence[float] = ()) -> list[Round]:
    """Rounds with these win rates, each ± 0.05, and KLs."""
    checks = {"true_reward": (estimated(0.5), estimated(0.6))}
    return [
        Round(n, f"round-{n}.yaml", "d", "m", 10, estimated(win), estimated(kl), checks)
        for n, (win, kl) in enumerate(zip(wins, far or [0.0] * len(wins), strict=True), 1)
    ]


@pytest.mark.parametrize(
    ("wins", "far", "limits", "kept", "over", "reason"),
    [
        ([], [], {}, 0, False, "Nothing is better yet"),
        ([0.7], [1], {}, 1, False, "Round 1 is kept"),
        ([0.7, 0.6, 0.56], [1, 2, 3], {}, 3, True, "There are 3 rounds at most"),
        # 0.54 ± 0.05 holds one half.
        ([0.7, 0.54], [1, 2], {}, 1, True, "Round 2 is no gain: it wins 0.540 ± 0.050"),
        ([0.4], [1], {}, 0, True, "Nothing is better yet .* Round 1 is no gain"),
        ([0.7, 0.6], [1, 4], {"max_kl": 3}, 1, True, "Round 2 is 4.00 nats .* max_kl 3"),
        ([0.7, 0.6], [1, 3], {"max_kl": 3}, 2, False, "Round 2 is kept"),
        ([0.7, 0.5], [1, 1], {"patience": 2}, 1, False, "Round 2 is no gain"),
        ([0.7, 0.5, 0.6], [1, 1, 1], {"patience": 2, "most": 9}, 3, False, "Round 3 is kept"),
        ([0.7, 0.5, 0.5], [1, 1, 1], {"patience": 2, "most": 9}, 1, True, "Round 3 is no gain"),
        ([0.7, 0.5, 0.6, 0.5], [1] * 4, {"patience": 2, "most": 9}, 3, False, "Round 4 is no"),
    ],
)
def test_rounds_end_where_nothing_is_gained_or_the_way_is_too_far(
    wins: list[float], far: list[float], limits: dict[str, Any], kept: int, over: bool, reason: str
) -> None:
    found = verdict(rounds(wins, far), RoundsConfig(**limits))
    assert (found.kept, found.over) == (kept, over)
    assert re.search(reason, found.reason)


def test_a_round_without_a_verdict_is_no_gain() -> None:
    unjudged = Round(1, "r", "d", "m", 10, None, None, {})
    found = verdict([unjudged], RoundsConfig(max_kl=1))
    assert (found.kept, found.over) == (0, True)


def test_the_first_round_is_the_recipe_itself(tmp_path: Path) -> None:
    loaded = going_round(tmp_path, rounds={"most": 2})
    assert make_plan(round_recipe(loaded, 1, None)).artifacts == make_plan(loaded).artifacts


def test_a_later_round_starts_from_the_new_policy_with_other_seeds(tmp_path: Path) -> None:
    steps = {
        "start": {"method": "sft", "model": POLICY, "seed": 3, **BLIND},
        "judge": {"method": "reward", "model": "start", **BLIND, "weights": "lora"},
    }
    alignment = {"method": "ppo", "model": "start", "reward_model": "judge", **BLIND}
    loaded = going_round(tmp_path, steps=steps, alignment=alignment)
    third = round_recipe(loaded, 3, Path("/store/merged/abc"))
    sampled, imported, far = third.candidates
    assert isinstance(sampled, SampledCandidates)
    assert (sampled.model, sampled.seed) == ("/store/merged/abc", 5 + 2)
    # What others answered before serves every round.
    assert (imported, far) == loaded.candidates[1:]
    trained = third.trainings
    models = [config.model for config in trained.values()]
    assert models == ["/store/merged/abc", "start", "start"]
    assert [config.seed for config in trained.values()] == [3 + 2, 2, 2]
    # The distance is from where it all began, and the win rate from the round's own start.
    assert third.evaluation is not None
    assert third.evaluation.kl_reference is not None
    assert third.evaluation.kl_reference.model == POLICY
    assert third.model_before() == ("/store/merged/abc", None)
    assert third.name == "small-round-3"
    assert third.rounds is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation": None}, "no `evaluation`, which says whether a round was a gain"),
        ({"judges": [{"kind": "prior", "name": "p", "order": ["policy", "far"]}]}, "none of the"),
        ({"candidates": OTHERS}, "no candidates are sampled from .*policy"),
        (
            {"candidates": [{**SAMPLED, "adapter": POLICY}, *OTHERS]},
            "no candidates are sampled from",
        ),
        (
            {"alignment": {"method": "ppo", "model": POLICY, "reward_model": "r", **BLIND}},
            r"alignment.reward_model: r fits the first round's base alone; train it as a step",
        ),
    ],
)
def test_a_recipe_that_cannot_go_round_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        rounds_of(going_round(tmp_path, **changes), None)


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"top_p": 0.9}, {"stop": ["\n"]}], ids=lambda s: next(iter(s))
)
def test_a_limit_of_the_kl_wants_answers_that_tell_it(
    sampling: dict[str, Any], tmp_path: Path
) -> None:
    evaluation = {"sampling": sampling}
    with pytest.raises(InputError, match=r"rounds\.max_kl: .* top_p 1 and no stop texts"):
        going_round(tmp_path, evaluation=evaluation, rounds={"max_kl": 3})
    assert going_round(tmp_path, evaluation=evaluation, rounds={"most": 2}).rounds is not None


class Carried:
    """Finishes each recipe at once, with the next of these win rates."""

    def __init__(self, store: Store, wins: Sequence[float]) -> None:
        self.store, self.wins = store, iter(wins)
        self.done: list[Path] = []

    def __call__(self, path: Path) -> bool:
        win = next(self.wins)
        plan = plan_with_answers(load_recipe(path), self.store)
        assert plan.alignment is not None
        assert plan.evaluation is not None
        model = Path(self.store.folder(plan.alignment)) / "model"
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps({"is": str(plan.alignment)}))
        summary = {"win_rate": estimated(win), "kl": estimated(1), "checks": {}}
        for artifact in (plan.dataset, plan.alignment, plan.evaluation):
            stage = (artifact.stage, artifact.fingerprint)
            self.store.finish(artifact, Manifest(*stage, "n", 7, 0, (), summary=summary))
        self.done.append(path)
        return True


def test_rounds_go_on_where_they_were_and_do_nothing_twice(tmp_path: Path) -> None:
    loaded, store = going_round(tmp_path), Store(tmp_path / "store")
    carried = Carried(store, [0.7, 0.6])
    with pytest.raises(StopIteration):  # As if it were killed in the third round.
        go_round(loaded, store, RoundsConfig(most=3), carried)
    carried.wins = iter([0.5])
    done, found = go_round(loaded, store, RoundsConfig(most=3), carried)
    assert [path.name for path in carried.done] == ["round-1.yaml", "round-2.yaml", "round-3.yaml"]
    assert (len(done), found.kept, found.over) == (3, 2, True)
    again, _ = go_round(loaded, store, RoundsConfig(most=3), lambda path: pytest.fail(str(path)))
    assert again == done
    # Each started from the model of the one before it.
    starts = [load_recipe(path).model_before()[0] for path in carried.done]
    models = [str(Path(store.root) / "artifacts" / one.model / "model") for one in done]
    assert starts == [POLICY, *models[:2]]


def test_a_round_without_a_gain_is_tried_again_from_the_same_start(tmp_path: Path) -> None:
    loaded, store = going_round(tmp_path), Store(tmp_path / "store")
    carried = Carried(store, [0.7, 0.5, 0.6, 0.4, 0.4])
    done, found = go_round(loaded, store, RoundsConfig(most=9, patience=2), carried)
    assert (len(done), found.kept, found.over) == (5, 3, True)
    starts = [load_recipe(path).model_before()[0] for path in carried.done]
    first, third = (f"{store.root}/artifacts/{done[n].model}/model" for n in (0, 2))
    assert starts == [POLICY, first, first, third, third]
    assert len({one.dataset for one in done}) == 5


def test_more_rounds_are_asked_for_later(tmp_path: Path) -> None:
    loaded, store = going_round(tmp_path), Store(tmp_path / "store")
    carried = Carried(store, [0.7, 0.6])
    for most in (1, 2):
        _, found = go_round(loaded, store, rounds_of(loaded, most), carried)
        assert (found.kept, found.over) == (most, True)
    assert len(carried.done) == 2


def test_a_round_that_waits_for_people_is_no_end(tmp_path: Path) -> None:
    loaded, store = going_round(tmp_path), Store(tmp_path / "store")
    done, found = go_round(loaded, store, RoundsConfig(), lambda path: False)
    assert (done, found.over) == ([], False)


def test_the_table_tells_start_rounds_and_what_is_kept() -> None:
    done = rounds([0.7, 0.5], [1.5, 2.5])
    table = rounds_table(done, verdict(done, RoundsConfig()))
    assert table.header == ("round", "pairs", "win rate", "KL, nats", "true reward", "")
    assert table.rows == (
        ("start", "", "", "0", "0.500 ± 0.050", ""),
        ("1", "10", "0.700 ± 0.050", "1.500 ± 0.050", "0.600 ± 0.050", "kept"),
        ("2", "10", "0.500 ± 0.050", "2.500 ± 0.050", "0.600 ± 0.050", "no gain"),
    )
    assert table.note.startswith("Round 1 is kept")
