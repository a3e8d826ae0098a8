"""What the reference was asked once, it is not asked again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from tests.training.architectures import apart
from tests.training.conftest import (
    QUICK,
    THINGS,
    equal,
    pairs_preferring,
    saved_weights,
    silent,
    write_split,
)
from training import reference, shared_prefix
from training.dpo import DPOConfig
from training.loop import train
from training.methods import Alignment, method_of
from training.models import load_tokenizer
from training.reference import beforehand, read_log_probs, write_log_probs
from training.run import TrainingRuntime

Prepare = Callable[..., Any]
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Examples of every batch that the reference is asked about."""
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.kto_trainer import KTOTrainer

    found: list[int] = []
    for kind, rows in ((DPOTrainer, 2), (KTOTrainer, 1)):
        real = kind.compute_ref_log_probs

        def ask(self: Any, model: Any, batch: Any, real: Any = real, rows: int = rows) -> Any:
            found.append(len(batch["input_ids"]) // rows)
            return real(self, model, batch)

        monkeypatch.setattr(kind, "compute_ref_log_probs", ask)
    return found


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """8 pairs, and none held out."""
    write_split(tmp_path / "pairs", "train", pairs_preferring("red red", 8, THINGS))
    return tmp_path / "pairs"


@pytest.fixture
def configure(model: str) -> Callable[..., Any]:
    """Two epochs, in two steps each."""
    settings = {**QUICK, "model": model, "method": "dpo", "probe": None, "epochs": 2}
    settings |= {"max_steps": None}
    return lambda **changes: TypeAdapter(Alignment).validate_python({**settings, **changes})


@pytest.fixture
def prepare(configure: Callable[..., Any], dataset: Path, tmp_path: Path) -> Prepare:
    """Make ready to train; the examples with what was asked about them."""

    def make(data: Path = dataset, **changes: Any) -> Any:
        config = configure(**changes)
        method = method_of(config)
        learnt, _ = method.load(config, data, load_tokenizer(config.model, None))
        trainer: Any = method.build(config, TrainingRuntime(), tmp_path, learnt, None)
        return trainer.train_dataset

    return make


@pytest.fixture
def run(configure: Callable[..., Any], dataset: Path, tmp_path: Path) -> Run:
    """Train to the end; the weights."""

    def start(name: str, **changes: Any) -> dict[str, Any]:
        runtime = TrainingRuntime(log_steps=1, save_steps=1)
        folder = tmp_path / name
        return saved_weights(
            folder, train(configure(**changes), dataset, folder, runtime, progress=silent)
        )

    return start


def test_another_adapter_loss_or_epoch_asks_nothing_again(
    run: Run, prepare: Prepare, asked: list[int], own_cache: Path
) -> None:
    first = run("first")
    assert asked == [4, 4]  # once, for two epochs
    prepare(lora={"rank": 2, "alpha": 2})
    prepare(weights="ia3")
    prepare(weights="full")
    prepare(loss="hinge", beta=0.5)
    prepare(labels="soft")
    assert asked == [4, 4]
    # Torn by a crash: asked again, to the same end.
    (file,) = (own_cache / "pairwright" / "reference").iterdir()
    os.truncate(file, file.stat().st_size // 2)
    assert equal(run("torn"), first)
    assert asked == [4, 4, 4, 4]


def test_asked_beforehand_or_in_every_step_it_says_the_same(
    run: Run, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"learning_rate": 1e-4}  # Adam makes a whole step of a gradient that is all but zero
    before = run("before", **small)
    assert asked == [4, 4]
    monkeypatch.setattr(reference, "beforehand", lambda *_: False)
    assert apart(run("in steps", **small), before) < 1e-6
    assert asked == [4, 4]


def test_pairs_that_were_added_are_all_that_is_asked_about(
    prepare: Prepare, asked: list[int], tmp_path: Path
) -> None:
    few = prepare()
    write_split(tmp_path / "more", "train", pairs_preferring("red red", 11, THINGS))
    more = prepare(tmp_path / "more")
    assert asked == [4, 4, 3]
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        assert more[column][:8] == few[column][:]
        assert all(-100 < value < 0 for value in more[column])


def test_pairs_find_what_was_asked_for_likes_but_likes_need_answers_to_other_prompts_too(
    prepare: Prepare, asked: list[int]
) -> None:
    likes = prepare(method="kto", batch_size=8)
    assert sum(asked) == 16  # a liked and a disliked answer of each pair
    pairs = prepare()
    assert sum(asked) == 16
    told = sorted(pairs["ref_chosen_logps"][:] + pairs["ref_rejected_logps"][:])
    assert told == sorted(likes["ref_logps"][:])
    assert set(likes["ref_KL_logps"]) != set(told)
    prepare(method="kto", batch_size=8, desirable_weight=2.0)
    assert sum(asked) == 16


def test_numbers_of_one_forward_pass_are_not_taken_for_the_others(
    prepare: Prepare, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare()
    monkeypatch.setattr(shared_prefix, "why_not", lambda _: "the test compares with it")
    prepare()
    assert asked == [4, 4, 4, 4]


@pytest.mark.parametrize(
    ("changes", "before"),
    [
        ({}, True),
        ({"epochs": 0.5}, False),
        ({"max_steps": 24}, False),  # 24·4 = 96 of 100
        ({"max_steps": 25}, True),
        ({"max_steps": 1, "weights": "full"}, True),  # nothing can be switched off
    ],
)
def test_the_reference_is_asked_beforehand_where_that_costs_nothing_more(
    changes: dict[str, Any], before: bool
) -> None:
    assert beforehand(DPOConfig(model="m", batch_size=4, **changes), 100) is before


def test_a_run_finds_its_own_numbers_again_whatever_others_have_added(tmp_path: Path) -> None:
    own, other = tmp_path / "base-own.json", tmp_path / "base-another.json"
    write_log_probs(own, {"a": -1.0, "b": -2.0})
    write_log_probs(other, {"a": -1.0000001, "c": -3.0})
    write_log_probs(tmp_path / "elsewhere-own.json", {"d": -4.0})
    assert read_log_probs(own, ["a", "b"]) == {"a": -1.0, "b": -2.0}
    assert read_log_probs(own, ["a", "c", "d"]) == {"a": -1.0, "c": -3.0}
    for torn in ("", "[]", '{"log_probs": {"a": null}}', '{"log_probs": {"a": NaN}}'):
        own.write_text(torn)
        assert read_log_probs(own, ["a", "b"]) == {"a": -1.0000001}
