"""A browser for the tests of pages."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, BrowserContext, FloatRect, Locator, Page

Open = Callable[..., Page]


@contextmanager
def tabs(browser: Browser, expected: str = "no error") -> Iterator[Open]:
    """Opens an address in a new tab, which must have no error at the end but what is expected."""
    errors: list[str] = []
    contexts: list[BrowserContext] = []

    def open_tab(address: str, **options: Any) -> Page:
        context = browser.new_context(**options)
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: errors.append("a dialog"))
        page.goto(address)
        return page

    yield open_tab
    for context in contexts:
        context.close()
    assert [error for error in errors if expected not in error] == []


def place(of: Locator) -> FloatRect:
    box = of.bounding_box()
    assert box is not None
    return box


def contrast(page: Page, front: str, behind: str) -> tuple[float, bool]:
    """That of the words of an element with the ground of another (WCAG), and if it is dark."""
    lights = []
    for selector, name in ((front, "color"), (behind, "backgroundColor")):
        color = page.locator(selector).first.evaluate(f"e => getComputedStyle(e).{name}")
        red, green, blue = (int(part) / 255 for part in re.findall(r"\d+", color)[:3])
        lights.append(0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2)
    return (max(lights) + 0.05) / (min(lights) + 0.05), lights[0] > lights[1]
