"""Pages in a real Chromium: what the tests of all pages share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
_PATIENCE_MS = 120_000
"""The machine may be busy; a test that holds does not wait."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A fresh Chromium; the test is skipped where there is none."""
    program = shutil.which("chromium")
    if program is None:
        assert os.environ.get("OAR_NO_SKIP") != "1", "nothing may be skipped here (OAR_NO_SKIP=1): there is no chromium"
        pytest.skip("there is no chromium")
    expect.set_options(timeout=_PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


class BrowserTab:
    """A page in a browser context of its own; notes what it asks for and what it complains about."""

    def __init__(self, browser: Browser, url: str, *, phone: bool = False) -> None:
        desk: dict[str, Any] = {"viewport": {"width": 960, "height": 640}, "reduced_motion": "reduce"}  # less to paint
        hand = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
        self.context = browser.new_context(**(hand if phone else desk))
        self.page = self.context.new_page()
        self.page.set_default_timeout(_PATIENCE_MS)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: message.type in ("error", "warning") and self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.url = url + "/"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.context.close()

    def go(self, fragment: str = "") -> Page:
        """Open the page, and wait until it can be used."""
        self.page.goto(self.url + fragment)
        self.page.wait_for_selector("body[data-ready]")
        return self.page

    def assert_clean(self) -> None:
        """It asked nobody but the server, and has nothing to complain about."""
        foreign = [url for url in self.requests if not url.startswith((self.url, "blob:" + self.url, "data:"))]
        assert not foreign, foreign
        assert not self.complaints, self.complaints

    def box(self, element: str) -> dict[str, float]:
        """Where an element lies, once it is shown and everything has its size."""
        self.page.locator(element).scroll_into_view_if_needed()
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))")
        box = self.page.locator(element).bounding_box()
        assert box is not None
        return dict(box)

    def poor_contrasts(self) -> list[tuple[str, float]]:
        """Visible texts whose contrast is below 4.5 to 1 (WCAG AA)."""
        poor: list[tuple[str, float]] = self.page.evaluate(_CONTRASTS)
        return poor


_CONTRASTS = """() => {
    const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const light = (rgb) => rgb.slice(0, 3).map((c) => c / 255).map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = (element) => {
        for (let at = element; at; at = at.parentElement) {
            const colour = parse(getComputedStyle(at).backgroundColor);
            if (colour.length < 4 || colour[3] === 1) return colour;
        }
    };
    const poor = [];
    for (const element of document.querySelectorAll("body *")) {
        const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
        if (!own || !element.checkVisibility() || element.closest("kbd, :disabled, .hidden")) continue;
        const [one, other] = [light(parse(getComputedStyle(element).color)), light(behind(element))];
        const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
        if (contrast < 4.5) poor.push([element.outerHTML.slice(0, 80), contrast]);
    }
    return poor;
}"""
