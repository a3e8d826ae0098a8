"""Argilla's pages in a real Chromium, and what a text that runs in them would give away."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from judging.argilla.server import Address

if TYPE_CHECKING:
    from playwright.sync_api import Browser, FrameLocator, Locator, Page, Route

OPTIONS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
OWN = ("fonts.googleapis.com", "fonts.gstatic.com")
"""Argilla itself asks these for its fonts."""
WIDE = {"width": 1280, "height": 800}


@dataclass
class Seen:
    """What a browser did that is none of Argilla's doing."""

    dialogs: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def nothing(self) -> bool:
        return not (self.dialogs or self.requests or self.errors)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser without a window; skips the test where none is installed."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium is installed: apt install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[*OPTIONS])
        try:
            yield browser
        finally:
            browser.close()


def sign_in(browser: Browser, address: Address, username: str) -> tuple[Page, Seen]:
    """A page on which somebody has signed in as people do, and what is seen of it from now on."""
    page = browser.new_page(viewport={"width": WIDE["width"], "height": WIDE["height"]})
    page.set_default_timeout(15_000)
    seen = Seen()

    def elsewhere(route: Route) -> None:
        if not any(host in route.request.url for host in OWN):
            seen.requests.append(route.request.url)
        route.abort()

    here = re.escape(address.url.removeprefix("http://"))
    page.route(re.compile(rf"^(?!data:|blob:|https?://{here}/)"), elsewhere)
    page.on("pageerror", lambda error: seen.errors.append(str(error)))

    def refuse(dialog: object) -> None:
        seen.dialogs.append(dialog.message)  # type: ignore[attr-defined]
        dialog.dismiss()  # type: ignore[attr-defined]

    page.on("dialog", refuse)
    (account,) = (a for a in address.created if a.username == username)
    page.goto(f"{address.url}/sign-in")
    page.locator("input[type=text]").fill(account.username)
    page.locator("input[type=password]").fill(account.password)
    page.keyboard.press("Enter")
    page.get_by_text("Your datasets").wait_for()
    return page, seen


def open_dataset(page: Page, address: Address, dataset: str) -> None:
    """The records that wait for an answer, the first of them shown."""
    page.goto(f"{address.url}/dataset/{dataset}/annotation-mode")
    shown(page).locator(".answer").first.wait_for()


def shown(page: Page) -> FrameLocator:
    """The record that is shown."""
    return page.frame_locator(".custom_field_component iframe")


def answers(page: Page) -> list[str]:
    """The texts of the answers that are shown, from A on."""
    return shown(page).locator(".answer .text").all_inner_texts()


def await_answer(page: Page, text: str) -> None:
    """Wait until a record with such an answer is shown."""
    shown(page).locator(".answer", has_text=text).first.wait_for()


def ran(page: Page) -> bool:
    """Whether a hostile text did what it tries to do."""
    return bool(page.evaluate("top.ran === 1"))


def field_named(page: Page, text: str) -> Locator:
    """The first that reads exactly so."""
    return page.get_by_text(text, exact=True).first
