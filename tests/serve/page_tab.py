"""The page of `oar serve` in Chromium, and a gate that holds the drawing where a test wants to look at it."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from browser_tab import BrowserTab
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Page, expect
from served import Served

from oar_scale.generation.continuous import ContinuousBatch, Progress


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


class Tab(BrowserTab):
    """The page of `oar serve`."""

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

    def swipe(self, element: str, *points: tuple[float, float]) -> None:
        """Draw with a finger over an element, through points that are given as shares of its width and height."""
        box = self.box(element)
        touch = self.context.new_cdp_session(self.page)
        for at, (x, y) in enumerate(points):
            place = {"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]}
            touch.send("Input.dispatchTouchEvent", {"type": "touchMove" if at else "touchStart", "touchPoints": [place]})
        touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


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
