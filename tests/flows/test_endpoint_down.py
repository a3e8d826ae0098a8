"""An endpoint that goes down costs its own shards, and nothing that was answered."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from preferences.errors import ServiceError
from preferences.records import Candidate, Judgment
from tests.flows.asking import Models, carry_out, parts, prepared, serving, write_recipe


def down_after(calls: int, model: str) -> Any:
    """The endpoint answers so many calls to a model and then refuses it."""
    seen: Counter[str] = Counter()

    def down(body: dict[str, Any]) -> bool:
        seen[body["model"]] += 1
        return body["model"] == model and seen[model] > calls

    return down


def test_a_judge_that_goes_down_loses_its_own_shards_and_no_answer(tmp_path: Path) -> None:
    models, whole = Models(), Models()
    with serving(models) as endpoint, serving(whole) as other:
        recipe = write_recipe(tmp_path, endpoint.url, prompts=64, judges=("frail", "steady"))
        models.down = down_after(50, "frail")
        with pytest.raises(ServiceError, match="503 down") as failure:
            carry_out(recipe, tmp_path / "store")
        assert len(str(failure.value).splitlines()) == 1
        run = prepared(recipe, tmp_path / "store")
        frail, steady = run.plan.judgments
        # 64 prompts of two answers, each pair in both orders: 128 judgments.
        assert run.store.manifest(frail) is None
        finished = run.store.manifest(steady)
        assert finished is not None
        assert finished.rows == 128
        assert models.by_model == {"policy": 128, "steady": 128, "frail": 50}
        kept = {j.judgment_id for j in run.store.read(frail, Judgment)}
        assert 0 < len(kept) <= 50

        models.down = lambda body: False
        carry_out(recipe, tmp_path / "store")
        assert models.by_model == {"policy": 128, "steady": 128, "frail": 128}
        assert models.asked_twice == 0
        carry_out(
            write_recipe(tmp_path, other.url, prompts=64, judges=("frail", "steady")),
            tmp_path / "whole",
        )
    mended, unbroken = parts(tmp_path / "store"), parts(tmp_path / "whole")
    assert mended.keys() == unbroken.keys()
    assert all(mended[name].equals(unbroken[name]) for name in mended)


def test_a_policy_that_goes_down_keeps_its_finished_shards_and_is_asked_for_the_rest(
    tmp_path: Path,
) -> None:
    models = Models()
    with serving(models) as endpoint:
        recipe = write_recipe(tmp_path, endpoint.url, prompts=64)
        models.down = down_after(70, "policy")
        with pytest.raises(ServiceError, match=r"candidates: \d of 8 shards failed"):
            carry_out(recipe, tmp_path / "store")
        run = prepared(recipe, tmp_path / "store")
        (policy,) = run.plan.candidates
        written = list(run.store.read(policy, Candidate))
        assert 0 < len(written) < 128
        assert {c.status for c in written} == {"complete"}
        assert models.by_model == {"policy": 70}
        models.down = lambda body: False
        carry_out(recipe, tmp_path / "store")
    assert models.by_model == {"policy": 128, "judge": 128}
    assert models.asked_twice == 0


def test_replies_under_way_when_one_call_fails_for_good_are_kept(tmp_path: Path) -> None:
    models = Models()
    with serving(models) as endpoint:
        recipe = write_recipe(tmp_path, endpoint.url, shard_size=1000, engine={"concurrency": 8})
        models.down = down_after(33, "policy")
        with pytest.raises(ServiceError):
            carry_out(recipe, tmp_path / "store")
        assert models.by_model["policy"] == 33
        models.down = lambda body: False
        carry_out(recipe, tmp_path / "store")
    # 40 prompts x 2: the 33 that were answered are not asked again.
    assert models.by_model["policy"] == 80
    assert models.asked_twice == 0
