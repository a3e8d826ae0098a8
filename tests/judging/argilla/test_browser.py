"""People label in a real browser: with the keys, with the mouse, and unharmed by what they read."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from judging.argilla.page import FIELD, content, field_settings, neutral
from judging.argilla.server import Address
from judging.people import Question, question
from preferences.records import Candidate, Judgment, Message, Prompt, messages_from, prompt_identity
from tests.judging.argilla.argilla_api import Client, Dataset, create_dataset, labels
from tests.judging.argilla.browser import (
    answers,
    await_answer,
    chromium,
    field_named,
    open_dataset,
    ran,
    shown,
    sign_in,
)
from tests.judging.argilla.hostile import HOSTILE, as_read
from tests.judging.argilla.labellers import new_name, people_at

if TYPE_CHECKING:
    from playwright.sync_api import Browser

AT_ONCE = 6
"""Hostile texts in one record: as turns, as answers and as metadata."""


@pytest.fixture(scope="module")
def browser(environment: object) -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def test_people_label_with_keys_and_mouse_and_the_sides_are_right(
    argilla: Address, browser: Browser, owner: Client
) -> None:
    name = new_name()
    people = people_at(argilla, name)
    asked = {one.question_id: one for one in (about(n, 2) for n in range(4))}
    people.ask(asked.values())
    page, seen = sign_in(browser, argilla, "annotator")
    open_dataset(page, argilla, dataset_of(owner, name))
    meant = {}
    for how in ("A is better", "B is better", "Tie", "Both are bad"):
        first, second = answers(page)
        number = first.split()[1]
        meant[number] = (how, first, second)
        chosen = page.locator("input:checked")
        chosen.wait_for(state="detached")  # The questions of the record before are gone, too.
        if how in ("A is better", "Both are bad"):
            # A click on a text must not cost the keys.
            shown(page).locator(".answer .text").first.click()
            page.keyboard.press({"A is better": "1", "Both are bad": "4"}[how])
            chosen.wait_for(state="attached")
            page.keyboard.press("Enter")
        else:
            page.locator("label.label-text", has_text=how).click()
            page.get_by_role("button", name="Submit").click()
        if len(meant) < 4:
            shown(page).locator(".text", has_text=f"Prompt {number} ").wait_for(state="detached")
            shown(page).locator(".answer").first.wait_for()
    page.get_by_text("The task is completed").wait_for()
    said = [one for one in people.answers() if isinstance(one, Judgment)]
    texts = {c.candidate_id: c.response for q in asked.values() for c in q.candidates}
    verdicts = {"A is better": "first", "B is better": "second"}
    assert len(said) == 4
    for one in said:
        first, second = (texts[i] for i in one.candidate_ids)
        how, *seen_as = meant[first.split()[1]]
        assert [first, second] == seen_as
        assert one.verdict == verdicts.get(how, "tie")
        assert (one.reply == "both bad") == (how == "Both are bad")
    assert seen.nothing()
    page.close()


def test_people_rank_with_keys(argilla: Address, browser: Browser, owner: Client) -> None:
    name = new_name()
    people = people_at(argilla, name)
    (asked,) = [about(0, 3)]
    people.ask([asked])
    page, _ = sign_in(browser, argilla, "annotator")
    open_dataset(page, argilla, dataset_of(owner, name, "-ranking-3"))
    page.locator("form [title='Answer A']").first.wait_for()
    for place in ("2", "1", "2"):  # of A, B and C
        page.keyboard.press(place)
        page.wait_for_timeout(600)  # Argilla waits 0.3 s for a second digit.
    page.keyboard.press("Enter")
    page.get_by_text("The task is completed").wait_for()
    (one,) = people.answers()
    assert isinstance(one, Judgment)
    assert one.scores is not None
    first, second, third = one.scores
    assert first == third < second
    assert one.candidate_ids == tuple(c.candidate_id for c in asked.candidates)
    page.close()


def test_people_search_filter_and_sort(argilla: Address, browser: Browser, owner: Client) -> None:
    made = dataset(owner, ["category"])
    asked = [about(n, 2) for n in range(6)]
    made.add(
        [
            {"fields": {FIELD: content(one)}, "metadata": {"category": ("odd", "even")[n % 2 == 0]}}
            for n, one in enumerate(asked)
        ]
    )
    page, _ = sign_in(browser, argilla, "owner")
    open_dataset(page, argilla, made.id)
    page.locator(".search-area__icon").click()
    page.locator("input[role=search]").fill('"Answer 4"')
    page.keyboard.press("Enter")
    await_answer(page, "Answer 4")
    field_named(page, "1 of 1").wait_for()
    open_dataset(page, argilla, f"{made.id}")
    field_named(page, "Filters").click()
    field_named(page, "Metadata").click()
    field_named(page, "category").click()
    field_named(page, "odd").click()
    page.mouse.click(600, 700)
    field_named(page, "1 of 3").wait_for()
    assert int(answers(page)[0].split()[1]) % 2 == 1
    open_dataset(page, argilla, made.id)
    field_named(page, "Sort").click()
    field_named(page, "inserted_at").click()
    page.mouse.click(600, 700)
    await_answer(page, "Answer 0")  # the oldest
    page.keyboard.press("ArrowRight")
    await_answer(page, "Answer 1")
    page.close()


@pytest.mark.parametrize("theme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_answers_have_equal_widths_and_nothing_is_cut_off(
    argilla: Address, browser: Browser, owner: Client, theme: str
) -> None:
    made = dataset(owner)
    wide = "x" * 400 + "\n\n|" + "a long cell|" * 12 + "\n|" + "-|" * 12 + "\n\n```\n" + "y " * 200
    long = "\n\n".join(f"Paragraph {n}. " + "word " * 80 for n in range(60))
    made.add([{"fields": {FIELD: content(asking("p", wide, long, "", "short"))}}])
    page, _ = sign_in(browser, argilla, "annotator")
    page.emulate_media(color_scheme=theme)  # type: ignore[arg-type]
    open_dataset(page, argilla, made.id)
    frame = page.locator(".custom_field_component iframe")
    for width in (1280, 700, 1800):
        page.set_viewport_size({"width": width, "height": 700})
        page.wait_for_timeout(300)
        boxes = [box.bounding_box() for box in shown(page).locator(".answer").all()]
        assert len({round(box["width"]) for box in boxes if box}) == 1
        outside = frame.bounding_box()
        assert outside
        for box in boxes:
            assert box
            assert box["y"] + box["height"] <= outside["y"] + outside["height"] + 1
            assert box["x"] + box["width"] <= outside["x"] + outside["width"] + 1
        inner = "e => e.scrollWidth <= e.clientWidth && e.scrollHeight <= e.clientHeight"
        assert all(text.evaluate(inner) for text in shown(page).locator(".text").all())
    page.close()


@pytest.mark.parametrize("texts", [HOSTILE[::8], pytest.param(HOSTILE, marks=pytest.mark.slow)])
def test_hostile_texts_neither_run_nor_hide(
    argilla: Address, browser: Browser, owner: Client, texts: Sequence[str]
) -> None:
    """As prompt, as answer and as metadata; every one is read as it was written."""
    names = [f"m{n}" for n in range(AT_ONCE)]
    made = dataset(owner, names)
    batches = [texts[at : at + AT_ONCE] for at in range(0, len(texts), AT_ONCE)]
    made.add([hostile_record(number, batch, names) for number, batch in enumerate(batches)])
    page, seen = sign_in(browser, argilla, "owner")
    open_dataset(page, argilla, made.id)
    left = dict(enumerate(batches))
    for _ in batches:
        read = shown(page)
        number = int(read.locator(".turn .text").first.inner_text())
        batch = left.pop(number)
        turns = read.locator(".turn .text").all_inner_texts()[1:]
        for text, turn, answer in zip(batch, turns, answers(page), strict=True):
            assert as_read(turn) == as_read(text)
            assert as_read(answer) == as_read(text)
        roles = read.locator(".turn .name").all_text_contents()[1:]
        assert [as_read(role).lower() for role in roles] == [as_read(t).lower() for t in batch]
        assert not ran(page)
        if left:
            page.keyboard.press("ArrowRight")
            gone = re.compile(rf"^\s*{number}\s*$")
            read.locator(".turn .text", has_text=gone).first.wait_for(state="detached")
            read.locator(".answer").first.wait_for()
    for at, name in enumerate(names):
        open_dataset(page, argilla, made.id)
        for step in ("Filters", "Metadata", name):
            field_named(page, step).click()
        menu = page.locator(".dropdown__content")
        menu.get_by_text("top.ran").first.wait_for()
        listed = "".join(menu.inner_text().split())
        for text in texts[at::AT_ONCE]:
            assert "".join(neutral(text).split()) in listed
    assert not ran(page)
    assert seen.nothing(), seen
    page.close()


IMAGE = "<img src=//evil.example/x.png onerror=top.ran=1>"


@pytest.mark.parametrize(
    ("turn", "category"),
    [
        ("x", f"$'{IMAGE}"),
        pytest.param(IMAGE, "x", marks=pytest.mark.slow),
        pytest.param("x", f"</script>{IMAGE}", marks=pytest.mark.slow),
        pytest.param("x", f"#TEMPLATE#{IMAGE}", marks=pytest.mark.slow),
    ],
)
def test_what_is_not_made_harmless_is_seen_to_run(
    argilla: Address, browser: Browser, owner: Client, turn: str, category: str
) -> None:
    """Else the test above could not fail."""
    fields = content(asking("p", "a", "b"))
    fields["turns"][0]["html"] = turn
    made = dataset(owner, ["category"])
    made.add([{"fields": {FIELD: fields}, "metadata": {"category": category}}])
    page, seen = sign_in(browser, argilla, "owner")
    page.goto(f"{argilla.url}/dataset/{made.id}/annotation-mode")
    page.wait_for_function("top.ran === 1")
    assert seen.requests[0].endswith("//evil.example/x.png")
    page.close()


def hostile_record(number: int, texts: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    turns = (Message("user", str(number)), *(Message(text, text) for text in texts))
    prompt = Prompt(prompt_identity(turns), turns, "test")
    candidates = tuple(
        Candidate(f"c{n}", prompt.prompt_id, "m", text, "complete") for n, text in enumerate(texts)
    )
    held = content(Question("q", prompt, candidates, "ask"))
    metadata = {name: neutral(text) for name, text in zip(names, texts, strict=False)}
    return {"fields": {FIELD: held}, "metadata": metadata}


def about(number: int, many: int) -> Question:
    """A question whose texts tell which it is."""
    return asking(f"Prompt {number} asks.", *(f"Answer {number} {'xyz'[n]}" for n in range(many)))


def asking(prompt_text: str, *texts: str) -> Question:
    messages = messages_from(prompt_text)
    prompt = Prompt(prompt_identity(messages), messages, "test")
    candidates = [
        Candidate(f"{prompt.prompt_id}-{n}", prompt.prompt_id, "m", text, "complete")
        for n, text in enumerate(texts)
    ]
    return question(prompt, candidates, "ask")


def dataset(owner: Client, metadata: Sequence[str] = ()) -> Dataset:
    return create_dataset(
        owner,
        f"browser-{time.monotonic_ns()}",
        {FIELD: field_settings()},
        {"better": labels("a", "b")},
        dict.fromkeys(metadata, "terms"),
    )


def dataset_of(owner: Client, recipe: str, more: str = "") -> str:
    found = owner("GET", "/me/datasets")["items"]
    (one,) = (d["id"] for d in found if d["name"] == recipe + more)
    return str(one)
