"""The page of a study in a real Chromium, against the real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser_tab import BrowserTab, chromium
from playwright.sync_api import Browser, Page, expect
from small_study import ServedStudy, open_png, served_study

from oar_scale.preference.answers import Answer, read_answers
from oar_scale.preference.study import ANSWERS

TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def shown(page: Page, done: int) -> str:
    """Wait for the pair after so many answers; returns its name."""
    page.wait_for_function("([done]) => document.getElementById('place').textContent.startsWith(`${done} of`)", arg=[done])
    page.wait_for_selector("body[data-comparison] #comparing:not([hidden])")
    return str(page.evaluate("document.body.dataset.comparison"))


def kept(folder: Path, server: ServedStudy) -> dict[str, Answer]:
    return {answer.comparison: answer for answer in read_answers(str(folder / ANSWERS), server.study.fingerprint)}


def test_a_whole_session_with_keys_undo_and_reload(browser: Browser, study_folder: Path) -> None:
    """Through a restart of the server on the same port, in which an answer is given."""
    with BrowserTab(browser, "http://127.0.0.1:9") as tab:
        with served_study(study_folder) as server:
            tab.url = server.url + "/"
            port = int(server.url.rpartition(":")[2])
            page = tab.go()
            expect(page.locator("#how-many")).to_have_text("10 times")
            assert tab.poor_contrasts() == []
            page.click("#start")
            first = shown(page, 0)
            expect(page.locator("#undo")).to_be_disabled()
            page.keyboard.press("ArrowLeft")
            second = shown(page, 1)
            page.keyboard.press("ArrowDown")
            shown(page, 2)
            page.keyboard.press("Backspace")
            assert shown(page, 1) == second
            page.locator("#right").dblclick()  # once, and not for the pair after it
            third = shown(page, 2)
            answers = kept(study_folder, server)
            assert {name: answer.choice for name, answer in answers.items()} == {first: "left", second: "right"}
            assert all(answer.ms >= 250 for answer in answers.values()) and len({answer.rater for answer in answers.values()}) == 1
            page.reload()
            assert shown(page, 2) == third
            tab.assert_clean()
        page.keyboard.press("ArrowRight")
        expect(page.locator("#trouble")).to_be_visible()
        with served_study(study_folder, port=port) as server:
            page.click("#again")
            shown(page, 3)
            assert kept(study_folder, server)[third].choice == "right"
            for done in range(3, 10):
                shown(page, done)
                page.keyboard.press("ArrowDown")
            expect(page.locator("#finished")).to_be_visible()
            assert len(kept(study_folder, server)) == 10
            page.reload()
            expect(page.locator("#finished")).to_be_visible()
            page.click("#undo-last")
            shown(page, 9)
            assert len(kept(study_folder, server)) == 9
            page.keyboard.press("ArrowDown")
            expect(page.locator("#finished")).to_be_visible()
            page.keyboard.press("ArrowLeft")  # there is nothing to choose
            page.keyboard.press("Backspace")
            shown(page, 9)
            assert len(kept(study_folder, server)) == 9


def test_a_phone_shows_both_pictures_without_scrolling(browser: Browser, study_folder: Path) -> None:
    """With the token of the link, by touch; what is on the left of the screen is what the server notes as left."""
    with served_study(study_folder, token=TOKEN) as server, BrowserTab(browser, server.url, phone=True) as tab:
        page = tab.go(f"#token={TOKEN}")
        assert TOKEN not in page.url
        page.tap("#start")
        first = shown(page, 0)
        for width, height in ((740, 360), (360, 740)):  # on its side, and upright
            page.set_viewport_size({"width": width, "height": height})
            boxes = [tab.box(element) for element in ("#left", "#right", "#tie", "#undo")]
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert all(box["y"] + box["height"] <= height and box["width"] >= 44 and box["height"] >= 44 for box in boxes)
            assert abs(boxes[0]["width"] - boxes[1]["width"]) < 1 and boxes[0]["x"] < boxes[1]["x"] and boxes[0]["width"] > 150
        pixels = page.evaluate(_PIXEL)
        page.tap("#left")
        shown(page, 1)
        answer = kept(study_folder, server)[first]
        comparison = server.sessions.comparisons[first]
        assert answer.choice == "left" and answer.swapped == server.study.swapped(answer.rater, first)
        name = comparison.pictures[1 if answer.swapped else 0]
        data = (study_folder / "pictures" / f"{name}.png").read_bytes()
        assert tuple(pixels) == open_png(data).getpixel((0, 0))
        markup = page.evaluate("document.querySelectorAll('#question b').length")
        assert markup == 0 and tab.poor_contrasts() == []
        tab.assert_clean()


_PIXEL = """() => {
    const image = document.getElementById("left-picture"), canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
    const context = canvas.getContext("2d", {willReadFrequently: true});
    context.drawImage(image, 0, 0);
    return [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)];
}"""
