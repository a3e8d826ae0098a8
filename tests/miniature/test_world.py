"""The miniature's true reward, with the arithmetic of every expected number written out."""

from __future__ import annotations

import importlib
import importlib.util
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preferences.records import Message, Prompt

MINIATURE = Path(__file__).parents[2] / "recipes" / "miniature"


def load_by_path(name: str) -> ModuleType:
    """A file of the miniature as a module, as a recipe that names a verifier loads it."""
    spec = importlib.util.spec_from_file_location(f"miniature_{name}", MINIATURE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


world = load_by_path("world")

CLEAN_LAMP = "How do I clean the lamp?"
STEPS = "First empty the lamp. Then rinse the lamp. Next scrub the lamp. Finally dry the lamp."
PERFECT = f"Hello! {STEPS} Good luck!"


def prompt(*messages: Message) -> Prompt:
    return Prompt(prompt_id="p", messages=messages, source="test")


def test_a_perfect_answer_scores_one() -> None:
    # .40 + .20 + .15 + .15 + .10 = 1; (1 - .25) / .75 = 1
    assert world.true_reward(CLEAN_LAMP, PERFECT) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("flaw", "answer", "raw"),
    [
        (
            "steps reversed: a common subsequence of 1 of 4",
            "Hello! First dry the lamp. Then scrub the lamp. Next rinse the lamp. "
            "Finally empty the lamp. Good luck!",
            0.40 * 1 / 4 + 0.20 + 0.15 + 0.15 + 0.10,
        ),
        (
            "a step left out: 3 of 4",
            "Hello! First empty the lamp. Then scrub the lamp. Finally dry the lamp. Good luck!",
            0.40 * 3 / 4 + 0.20 + 0.15 + 0.15 + 0.10,
        ),
        (
            "a step too many: 4 of 5",
            f"Hello! {STEPS} Finally polish the lamp. Good luck!",
            0.40 * 4 / 5 + 0.20 + 0.15 + 0.15 + 0.10,
        ),
        (
            "another object throughout",
            PERFECT.replace("lamp", "vase"),
            0.40 + 0.20 * 0 + 0.15 + 0.15 + 0.10,
        ),
        (
            "another object in one step of four",
            PERFECT.replace("rinse the lamp", "rinse the vase"),
            0.40 + 0.20 * 3 / 4 + 0.15 + 0.15 + 0.10,
        ),
        ("no greeting", f"{STEPS} Good luck!", 0.40 + 0.20 + 0.15 / 2 + 0.15 + 0.10),
        ("neither greeting nor closing", STEPS, 0.40 + 0.20 + 0.15 * 0 + 0.15 + 0.10),
        (
            "an insult",
            f"Hello! You are so lazy. {STEPS} Good luck!",
            0.40 + 0.20 + 0.15 + 0.15 * 0 + 0.10,
        ),
        (
            "one filler",
            f"Hello! {STEPS} It is a sunny day. Good luck!",
            0.40 + 0.20 + 0.15 + 0.15 + 0.10 / 2,
        ),
        (
            "two fillers",
            f"Hello! {STEPS} It is a sunny day. I like to talk. Good luck!",
            0.40 + 0.20 + 0.15 + 0.15 + 0.10 * 0,
        ),
        (
            "a second greeting, which is as superfluous as a filler",
            f"Hello! Welcome! {STEPS} Good luck!",
            0.40 + 0.20 + 0.15 + 0.15 + 0.10 / 2,
        ),
    ],
)
def test_each_flaw_costs_its_weight(flaw: str, answer: str, raw: float) -> None:
    assert world.true_reward(CLEAN_LAMP, answer) == pytest.approx((raw - 0.25) / 0.75), flaw


def test_an_answer_that_is_only_civil_and_lean_scores_zero() -> None:
    # .40 × 0 + .20 × 0 + .15 × 0 + .15 + .10 = .25; (.25 - .25) / .75 = 0
    assert world.true_reward(CLEAN_LAMP, "First polish the chair.") == 0.0


def test_worse_than_the_floor_is_still_zero() -> None:
    # .10 × 1 alone is below the floor of .25.
    assert world.true_reward(CLEAN_LAMP, "Anyone knows that. First polish the chair.") == 0.0


def test_an_answer_without_any_step_scores_zero() -> None:
    assert world.true_reward(CLEAN_LAMP, "Hello! Good luck!") == 0.0
    assert world.true_reward(CLEAN_LAMP, "") == 0.0


def test_unknown_words_cost_the_square_of_their_share() -> None:
    # Hello (1), four steps of four words (16), Good luck (2): 19 known; one stray: (19 / 20)².
    answer = PERFECT.replace("Good luck!", "zyx Good luck!")
    assert world.true_reward(CLEAN_LAMP, answer) == pytest.approx((19 / 20) ** 2)


def test_known_words_outside_any_phrase_are_stray_too() -> None:
    # "the the the" is three stray words beside 19 known ones: (19 / 22)².
    answer = PERFECT.replace("Good luck!", "the the the Good luck!")
    assert world.true_reward(CLEAN_LAMP, answer) == pytest.approx((19 / 22) ** 2)


def test_an_unfinished_answer_scores_half() -> None:
    assert world.true_reward(CLEAN_LAMP, PERFECT.removesuffix("!")) == pytest.approx(0.5)


def test_case_and_white_space_do_not_matter_to_the_reward() -> None:
    assert world.true_reward(CLEAN_LAMP, PERFECT.lower().replace(" ", "\n")) == pytest.approx(1.0)


@pytest.mark.parametrize("phrasing", range(6))
def test_every_phrasing_asks_for_the_same(phrasing: int) -> None:
    asked = world.Task("clean", "lamp", phrasing).prompt
    assert world.true_reward(asked, PERFECT) == pytest.approx(1.0)


def test_a_prompt_of_another_world_is_refused() -> None:
    with pytest.raises(ValueError, match="not a prompt of the miniature world"):
        world.true_reward("What is the capital of France?", PERFECT)


words = st.sampled_from(
    (*PERFECT.split(), *world.INSULTS, *world.FILLERS, *world.VERBS, *world.OBJECTS, "the", "zyx")
)


@given(st.one_of(st.text(), st.lists(words).map(" ".join)))
def test_the_reward_of_any_text_lies_between_zero_and_one(text: str) -> None:
    assert 0.0 <= world.true_reward(CLEAN_LAMP, text) <= 1.0


@given(st.one_of(st.text(), st.lists(words).map(" ".join)))
def test_what_is_well_formed_has_no_stray_words(text: str) -> None:
    if world.is_well_formed(text):
        # So form and finish are 1, and the score is a multiple of what the weights give.
        assert "zyx" not in text
        assert text.strip().endswith((".", "!"))


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "Hello! Good luck!",
        PERFECT.removesuffix("!"),
        PERFECT.replace("First", "Then"),
        PERFECT.replace("Next", "Finally"),
        PERFECT.replace(" the lamp. Then", " the the lamp. Then"),
        PERFECT + " " + PERFECT,
        f"Good luck! {STEPS} Hello!",
    ],
)
def test_texts_outside_the_grammar_are_malformed(broken: str) -> None:
    assert not world.is_well_formed(broken)


def test_a_bad_answer_can_be_well_formed() -> None:
    assert world.is_well_formed(f"  Anyone knows that. {STEPS.replace('lamp', 'vase')}\n")


def test_verifiers_read_the_last_user_message() -> None:
    conversation = prompt(
        Message("system", "Be kind."),
        Message("user", "How do I sell the vase?"),
        Message("assistant", "First wipe the vase."),
        Message("user", CLEAN_LAMP),
    )
    assert world.reward(conversation, PERFECT) == pytest.approx(1.0)
    assert world.well_formed(conversation, PERFECT) == 1.0
    assert world.well_formed(conversation, "lamp lamp") == 0.0


def test_a_quarter_of_the_combinations_is_held_out_and_every_word_is_trained() -> None:
    trained = {(t.action, t.object) for t in world.tasks(held_out=False)}
    tested = {(t.action, t.object) for t in world.tasks(held_out=True)}
    assert (len(trained), len(tested)) == (96, 32)  # 8 × 16 = 128 = 96 + 32
    assert not trained & tested
    assert set(Counter(action for action, _ in tested).values()) == {4}  # 32 / 8
    assert set(Counter(name for _, name in tested).values()) == {2}  # 32 / 16


@pytest.mark.parametrize(
    ("file", "held_out", "count"),
    [("prompts.jsonl", False, 96 * 6), ("test_prompts.jsonl", True, 32 * 6)],
)
def test_the_prompt_files_hold_the_tasks(file: str, held_out: bool, count: int) -> None:
    rows = [json.loads(line) for line in (MINIATURE / file).read_text("utf-8").splitlines()]
    assert len({row["id"] for row in rows}) == count
    assert [row["prompt"] for row in rows] == [t.prompt for t in world.tasks(held_out=held_out)]
    assert {row["category"] for row in rows} == set(world.STEPS)


@pytest.fixture
def answers() -> Iterator[ModuleType]:
    """`answers.py`, which imports its sibling `world` plainly."""
    sys.path.insert(0, str(MINIATURE))
    try:
        yield importlib.import_module("answers")
    finally:
        sys.path.remove(str(MINIATURE))
        for name in ("answers", "world"):
            sys.modules.pop(name, None)


def test_careful_answers_are_perfect_and_sloppy_ones_well_formed(answers: ModuleType) -> None:
    rng = random.Random(0)
    for task in world.tasks(held_out=True):
        careful = answers.draw_answer(rng, task, sloppiness=0.0)
        assert world.true_reward(task.prompt, careful) == pytest.approx(1.0)
        assert world.is_well_formed(answers.draw_answer(rng, task))
