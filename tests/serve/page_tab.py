"""The page of `oar serve` in Chromium, and a gate that holds the drawing where a test wants to look at it."""

from __future__ import annotations

import io
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright
from served import Served

from oar_scale.generation.continuous import ContinuousBatch, Progress

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
_PATIENCE_MS = 120_000
"""The machine may be busy; a test that holds does not wait."""


class Gate:
    """What every pass through the model waits for: open, or open for some passes."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._passes: int | None = None

    def hold(self, passes: int) -> None:
        """Let so many passes through, and no more."""
        with self._changed:
            self._passes = passes
            self._changed.notify_all()

    def open(self) -> None:
        with self._changed:
            self._passes = None
            self._changed.notify_all()

    def wait(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._passes != 0)
            if self._passes is not None:
                self._passes -= 1


def cut(server: Served) -> None:
    """Break every connection, as a network that goes away."""

    def abort() -> None:
        for connection in list(server.server.server_state.connections):
            connection.transport.abort()  # type: ignore[union-attr]

    loop = server.service.worker._loop
    assert loop is not None
    loop.call_soon_threadsafe(abort)


@contextmanager
def held_passes() -> Iterator[Gate]:
    """Every pass of every batch waits for this gate."""
    gate, step = Gate(), ContinuousBatch.step

    def waiting(batch: ContinuousBatch) -> list[Progress]:
        gate.wait()
        return step(batch)

    ContinuousBatch.step = waiting  # type: ignore[method-assign]
    try:
        yield gate
    finally:
        gate.open()
        ContinuousBatch.step = step  # type: ignore[method-assign]


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


class Tab:
    """The page in a browser context of its own; notes what it asks for and what it complains about."""

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

    def draw(self, prompt: str, **fields: object) -> Page:
        """Draw and wait for the pictures."""
        self.ask(prompt, **fields)
        return self.finished()

    def ask(self, prompt: str, **fields: object) -> None:
        self.page.fill("#prompt", prompt)
        for name, value in fields.items():
            self.page.fill(f"#{name}", str(value))
        self.page.click("#draw")

    def finished(self) -> Page:
        expect(self.page.locator("#draw")).to_be_visible()
        expect(self.page.locator("#download")).to_be_enabled()
        return self.page

    def look(self, view: str) -> None:
        self.page.locator(f'input[name="view"][value="{view}"]').check(force=True)

    def edit(self, data: bytes | None = None, name: str = "photo.png", kind: str = "image/png") -> None:
        """Choose a picture to be edited."""
        self.page.evaluate("document.querySelector('input[name=mode][value=edit]').click()")
        self.page.locator("#file").set_input_files({"name": name, "mimeType": kind, "buffer": PHOTO if data is None else data})

    def downloaded(self) -> tuple[str, bytes]:
        """Name and bytes of the file that the button gives."""
        with self.page.expect_download() as event:
            self.page.click("#download")
        return event.value.suggested_filename, event.value.path().read_bytes()

    def kept(self) -> int:
        """Drawings in the browser's database."""
        count: int = self.page.evaluate(
            """() => new Promise((resolve) => {
                const open = indexedDB.open("oar-serve");
                open.onsuccess = () => {
                    const all = open.result.transaction("drawings").objectStore("drawings").count();
                    all.onsuccess = () => { open.result.close(); resolve(all.result); };
                };
            })"""
        )
        return count

    def assert_clean(self) -> None:
        """It asked nobody but the server, and has nothing to complain about."""
        foreign = [url for url in self.requests if not url.startswith((self.url, "blob:" + self.url, "data:"))]
        assert not foreign, foreign
        assert not self.complaints, self.complaints

    def replay(self, step: int) -> int:
        """Set the slider; returns the cell that is placed last there."""
        self.page.locator("#step").fill(str(step))
        found = re.match(r"Row (\d+), column (\d+): step", self.page.locator("#cell").text_content() or "")
        assert found
        return 8 * (int(found[1]) - 1) + int(found[2]) - 1

    def colours(self) -> list[tuple[int, ...]]:
        """Of the 64 cells of the first picture, near a corner, where no figure is written; once all is painted."""
        read: list[list[int]] = self.page.evaluate(_COLOURS)
        return [tuple(colour) for colour in read]

    def box(self, element: str) -> dict[str, float]:
        """Where an element lies, once it is shown and everything has its size."""
        self.page.locator(element).scroll_into_view_if_needed()
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))")
        box = self.page.locator(element).bounding_box()
        assert box is not None
        return dict(box)

    def swipe(self, element: str, *points: tuple[float, float]) -> None:
        """Draw with a finger over an element, through points that are given as shares of its width and height."""
        box = self.box(element)
        touch = self.context.new_cdp_session(self.page)
        for at, (x, y) in enumerate(points):
            place = {"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]}
            touch.send("Input.dispatchTouchEvent", {"type": "touchMove" if at else "touchStart", "touchPoints": [place]})
        touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    def poor_contrasts(self) -> list[tuple[str, float]]:
        """Visible texts whose contrast is below 4.5 to 1 (WCAG AA)."""
        poor: list[tuple[str, float]] = self.page.evaluate(_CONTRASTS)
        return poor


def pixels(png: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def _photo() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


PHOTO = _photo()
"""48 x 32 pixels, each of another colour."""

_COLOURS = """() => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(() => {
    const canvas = document.querySelector(".tile canvas"), copy = new OffscreenCanvas(canvas.width, canvas.height);
    const context = copy.getContext("2d", {willReadFrequently: true}); // Chromium complains of readings from the canvas itself
    context.drawImage(canvas, 0, 0);
    const at = (cell) => [(cell % 8 + 0.15) / 8 * canvas.width, (Math.floor(cell / 8) + 0.15) / 8 * canvas.height];
    resolve(Array.from({length: 64}, (_, cell) => [...context.getImageData(...at(cell), 1, 1).data.slice(0, 3)]));
})))"""

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
