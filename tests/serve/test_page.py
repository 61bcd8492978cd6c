"""The page of `oar serve` in a real Chromium, against the real server with the quick start's model."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from operator import eq
from pathlib import Path

import numpy as np
import pytest
from browser_tab import chromium
from page_tab import PHOTO, Gate, Tab, cut, held_passes, pixels
from PIL import Image
from playwright.sync_api import Browser, expect
from served import Served, load, served
from waiting import wait_until

import oar_scale
from oar_scale.generation.picture_files import read_record

EMOJI = Path(__file__).resolve().parents[2] / "recipes" / "weights" / "emoji"
TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def passes() -> Iterator[Gate]:
    with held_passes() as gate:
        yield gate


@pytest.fixture(scope="module")
def emoji(browser: Browser, passes: Gate) -> Iterator[Served]:
    with served(oar_scale.load(str(EMOJI)), slots=16) as server:
        yield server


@pytest.fixture
def tab(browser: Browser, emoji: Served, passes: Gate) -> Iterator[Tab]:
    with Tab(browser, emoji.url) as tab:
        yield tab
        passes.open()
        tab.assert_clean()


@pytest.fixture
def phone(browser: Browser, emoji: Served) -> Iterator[Tab]:
    with Tab(browser, emoji.url, phone=True) as tab:
        yield tab
        tab.assert_clean()


# -- drawing ---------------------------------------------------------------------------------------------------------------------


def test_cells_appear_in_their_order_while_it_is_drawn(tab: Tab, passes: Gate) -> None:
    page = tab.go()
    passes.hold(24)
    tab.ask("a red apple", seed=1)
    expect(page.locator("#placed")).to_have_text("24 of 64 cells")
    tab.look("order")
    early = tab.colours()
    passes.open()
    tab.finished()
    late = tab.colours()
    assert sum(map(eq, early, late)) == 24 and len(set(late)) > 60
    tab.replay(24)
    assert tab.colours() == early


def test_a_heat_map_of_the_order_with_replay_and_words(tab: Tab) -> None:
    page = tab.go()
    tab.draw("a smiling cat", seed=2)
    tab.look("order")
    first = tab.replay(1)
    assert "step 1 of 64" in (page.locator("#cell").text_content() or "")
    last = tab.replay(64)
    order = tab.colours()
    assert (order[first], order[last]) == ((68, 1, 84), (253, 231, 37))  # the ends of viridis
    tab.look("confidence")
    expect(page.locator("#legend")).to_contain_text("% sure")
    assert sum(map(eq, order, tab.colours())) < 8


def test_a_download_can_be_made_again_from_its_record(tab: Tab, emoji: Served) -> None:
    page = tab.go()
    tab.draw("a red apple", seed=7, count=2, guidance=3)
    page.locator(".tile").nth(1).click()
    name, png = tab.downloaded()
    record = read_record(png)
    assert name == "a-red-apple-7-1.png"
    assert record is not None and (record.prompt, record.seed, record.number, record.settings.guidance) == ("a red apple", 7, 1, 3.0)
    again = emoji.service.drawer.sample(["a red apple"], seed=7, images=[1], guidance=3.0)[0]
    assert np.abs(pixels(png).astype(int) - np.asarray(again).astype(int)).max() <= 1


def test_a_cancelled_drawing_ends_on_the_server_too(tab: Tab, emoji: Served, passes: Gate) -> None:
    page, before = tab.go(), emoji.service.metrics.jobs.labels("sample", "cancelled")._value.get()
    passes.hold(8)
    tab.ask("a red apple")
    expect(page.locator("#placed")).to_have_text("8 of 64 cells")
    page.keyboard.press("Escape")
    expect(page.locator("#draw")).to_be_visible()
    expect(page.locator("#history")).to_be_hidden()
    passes.open()
    wait_until(lambda: emoji.service.metrics.jobs.labels("sample", "cancelled")._value.get() == before + 1)
    wait_until(emoji.idle)
    tab.draw("a red apple")


def test_a_broken_connection_is_said_and_loses_nothing(tab: Tab, emoji: Served, passes: Gate) -> None:
    page = tab.go()
    passes.hold(16)
    tab.ask("a red apple", seed=1)
    expect(page.locator("#placed")).to_have_text("16 of 64 cells")
    page.evaluate("""() => {
        window.said = [];
        new MutationObserver(() => window.said.push(document.getElementById("announcer").textContent))
            .observe(document.getElementById("announcer"), {childList: true});
    }""")
    cut(emoji)
    wait_until(lambda: page.evaluate("window.said.some((text) => text.startsWith('Connection lost'))"))
    passes.open()
    tab.finished()
    tab.look("order")
    assert len(set(tab.colours())) > 60
    expect(page.locator("#announcer")).to_contain_text("Finished")
    tab.complaints.clear()  # Chromium notes that the connection was reset


def test_events_are_read_whatever_way_they_are_cut(tab: Tab) -> None:
    text = ': ping\r\nid: 1\r\nevent: step\r\ndata: {"a":\r\ndata: "é😀"}\r\n\r\nid: 2\nevent: done\ndata: {}\n\ndata: {"half'
    events = tab.go().evaluate(
        """async (text) => {
            const {parse} = await import("./static/events.js"), bytes = new TextEncoder().encode(text), results = [];
            for (const size of [1, 2, 3, 7, 1000]) {
                const chunks = new ReadableStream({start(stream) {
                    for (let at = 0; at < bytes.length; at += size) stream.enqueue(bytes.slice(at, at + size));
                    stream.close();
                }});
                const events = [];
                for await (const event of parse(chunks)) events.push(event);
                results.push(JSON.stringify(events));
            }
            return results;
        }""",
        text,
    )
    assert len(set(events)) == 1
    assert json.loads(events[0]) == [{"name": "step", "id": "1", "data": {"a": "é😀"}}, {"name": "done", "id": "2", "data": {}}]


# -- what is written ---------------------------------------------------------------------------------------------------------------


def test_prompts_of_any_script_are_shown_and_markup_is_text(tab: Tab) -> None:
    page = tab.go()
    markup = '<img src=x onerror="document.title=1"> a red apple <script>document.title=2</script>'
    for prompt, direction in ((markup, "ltr"), ("תפוח apple", "rtl"), ("🍎 apple 👩🏽‍🚀", "ltr")):
        tab.draw(prompt)
        shown = page.locator("#about-prompt")
        expect(shown).to_have_text(prompt)
        assert shown.evaluate("element => getComputedStyle(element).direction") == direction
        expect(page.locator("#history .thumb").first).to_have_attribute("title", prompt)
        name, png = tab.downloaded()
        record = read_record(png)
        assert record is not None and record.prompt == prompt
        assert "apple" in name
    assert page.locator('img[src="x"], #about script, #history script').count() == 0
    assert page.title() == "small – oar serve"


def test_wrong_input_is_explained_next_to_its_field(tab: Tab) -> None:
    page = tab.go()
    tab.ask("")
    expect(page.locator("#error-prompt")).to_have_text("Write what is to be drawn.")
    tab.ask("a red apple", count=11)
    expect(page.locator("#error-count")).to_have_text("Pictures: a whole number from 1 to 10.")
    expect(page.locator("#error-prompt")).to_be_hidden()
    assert page.evaluate("document.activeElement.id") == "count"
    expect(page.locator("#count")).to_have_attribute("aria-invalid", "true")
    page.fill("#count", "1")
    expect(page.locator("#error-count")).to_be_hidden()
    page.locator("#more").evaluate("fold => { fold.open = true }")
    page.fill("#top_p", "0")
    page.locator("#more").evaluate("fold => { fold.open = false }")
    page.click("#draw")
    expect(page.locator("#error-top_p")).to_be_visible()
    page.fill("#top_p", "1")
    page.evaluate("document.getElementById('order').selectedOptions[0].value = '<b>backwards</b>'")
    page.click("#draw")  # what the server alone finds has its place, too
    expect(page.locator("#error-order")).to_contain_text("Order '<b>backwards</b>': this model can follow")
    tab.complaints.clear()  # Chromium notes each answer that is an error


def test_a_server_that_wants_a_token_gets_it(browser: Browser, emoji: Served) -> None:
    with served(emoji.service.drawer, token=TOKEN) as closed, Tab(browser, closed.url) as tab:
        tab.page.goto(tab.url)
        tab.page.fill("#token", "another token")
        tab.page.keyboard.press("Enter")
        expect(tab.page.locator("#error-token")).to_contain_text("not the token")
        tab.page.fill("#token", TOKEN)
        tab.page.keyboard.press("Enter")
        tab.page.wait_for_selector("body[data-ready]")
        tab.draw("a red apple")  # its picture is fetched with the token, too
        with Tab(browser, closed.url) as other:
            other.go(f"#token={TOKEN}")
            assert TOKEN not in other.page.url
            other.assert_clean()


def test_a_model_of_classes_asks_for_a_class(browser: Browser, passes: Gate, tmp_path: Path) -> None:
    with served(load(tmp_path, "classes")) as server, Tab(browser, server.url) as tab:
        page = tab.go()
        expect(page.get_by_label("Class")).to_be_visible()
        expect(page.locator("#prompt")).to_be_hidden()
        page.fill("#class", "10")
        page.click("#draw")
        expect(page.locator("#error-prompt")).to_have_text("Class: a whole number from 0 to 9.")
        page.fill("#class", "9")
        page.click("#draw")
        record = read_record(tab.finished() and tab.downloaded()[1])
        assert record is not None and str(record.prompt) == "9"
        tab.assert_clean()


# -- editing -----------------------------------------------------------------------------------------------------------------------


def test_a_mask_by_mouse_and_known_pixels_that_stay(tab: Tab) -> None:
    page = tab.go()
    tab.edit()
    box = tab.box("#overlay")
    page.locator("#thickness").fill("6")
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    expect(page.locator("#mask-share")).to_have_text("7 % of the picture is drawn anew")
    tab.draw("a red apple", seed=3)
    name, png = tab.downloaded()
    before, after = pixels(PHOTO), pixels(png)
    changed = (before != after).any(2)
    rows, columns = np.nonzero(changed)
    assert name == "a-red-apple-3-0.png"
    assert changed.sum() > 60 and (rows.min(), rows.max() + 1) == (13, 19) and columns.min() >= 9 and columns.max() < 27
    record = read_record(png)
    assert record is not None and record.kind == "edit" and record.size == (48, 32)
    tab.look("order")
    assert (page.locator(".tile canvas").bounding_box() or {})["width"] % 48 == 0


def test_a_finger_draws_a_mask_on_a_phone(phone: Tab) -> None:
    page = phone.go()
    phone.edit()
    phone.swipe("#overlay", (0.3, 0.3), (0.5, 0.5), (0.7, 0.7))
    expect(page.locator("#mask-share")).to_contain_text("% of the picture is drawn anew")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.fill("#prompt", "a red apple")
    page.click("#draw")  # a tap of half a second, on a busy machine, is none
    phone.finished()
    changed = (pixels(PHOTO) != pixels(phone.downloaded()[1])).any(2)
    canvas, replay = (page.locator(each).bounding_box() or {} for each in (".tile canvas", "#replay"))
    assert canvas["y"] + canvas["height"] <= replay["y"]
    assert changed[16, 24] and not changed[:4].any() and not changed[:, :8].any()
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_a_generated_picture_is_edited_with_keys_alone(tab: Tab) -> None:
    page = tab.go()

    def tab_to(name: str) -> None:
        for _ in range(60):
            if page.evaluate("document.activeElement.id || document.activeElement.value") == name:
                assert page.evaluate("document.activeElement.matches(':focus-visible')")
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"Tab never reached {name}")

    tab_to("prompt")
    page.keyboard.type("a red apple")
    page.keyboard.press("Control+Enter")
    tab.finished()
    tab_to("edit-this")
    page.keyboard.press("Enter")
    page.wait_for_selector("#masking:not([hidden])")
    tab_to("brush")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    tab_to("overlay")
    page.keyboard.press("Space")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "Shift+ArrowDown"):
        page.keyboard.press(key)
    page.keyboard.press("Enter")
    expect(page.locator("#mask-share")).to_have_text("2 % of the picture is drawn anew")  # 3 x 6 of 32 x 32
    page.keyboard.press("Control+z")
    expect(page.locator("#mask-share")).to_have_text("Mark what is to be drawn anew")
    page.keyboard.press("Control+Shift+z")
    page.keyboard.press("Control+Enter")
    tab.finished()
    expect(page.locator("#about-facts")).to_contain_text("Drawn")


def test_masks_are_what_is_sent_pixel_by_pixel(tab: Tab) -> None:
    png, drawn = tab.go().evaluate(
        """async () => {
            const {Mask} = await import("./static/mask.js"), mask = new Mask(41, 23);
            mask.begin(); mask.line(5, 5, 30, 20, 5, 1);
            mask.begin(); mask.box(-3, 10, 8, 99, 1);
            mask.begin(); mask.line(20.5, 14.5, 20.5, 14.5, 1, 0);
            mask.begin(); mask.invert();
            mask.begin(); mask.clear(); mask.undo();
            const copy = new Mask(41, 23);
            await copy.unpack(await mask.pack());
            return [[...new Uint8Array(await (await copy.png()).arrayBuffer())], [...mask.drawn]];
        }"""
    )
    sent = Image.open(io.BytesIO(bytes(png)))
    assert (sent.mode, sent.size) == ("L", (41, 23))
    wanted = np.array(drawn, dtype=bool).reshape(23, 41)
    assert (np.asarray(sent) == wanted * 255).all()
    assert not wanted[10:, :8].any() and wanted[14, 20] and not wanted[13, 18] and wanted[0].all()  # box, erased, line, inverted


def test_files_that_cannot_be_edited_are_refused_in_words(tab: Tab) -> None:
    page = tab.go()
    page.get_by_label("Edit", exact=True).check(force=True)
    page.fill("#prompt", "a red apple")
    page.click("#draw")
    error = page.locator("#error-image")
    expect(error).to_have_text("Choose the picture that is to be edited.")
    tab.edit(b"no picture", "notes.png")
    expect(error).to_contain_text("cannot read notes.png")
    tab.edit(b"%PDF", "notes.pdf", "application/pdf")
    expect(error).to_contain_text("notes.pdf is no picture")
    tab.edit(PHOTO + bytes(11 << 20))
    expect(error).to_contain_text("11.5 MB; at most 10.5 MB")
    file = io.BytesIO()
    Image.new("1", (5000, 4000)).save(file, "PNG")
    tab.edit(file.getvalue(), "wall.png")
    expect(error).to_contain_text("wall.png has 5000 x 4000 pixels")
    page.click("#smaller")
    expect(page.locator("#source-name")).to_contain_text("Smaller copy of wall.png, 4556 x 3645")
    expect(error).to_be_hidden()
    tab.edit()
    expect(error).to_be_hidden()
    page.click("#draw")
    expect(page.locator("#error-mask")).to_contain_text("Nothing is marked")
    page.click("#invert")
    page.click("#draw")
    expect(page.locator("#error-mask")).to_contain_text("All of the picture is marked")


# -- around it ---------------------------------------------------------------------------------------------------------------------


def test_history_survives_a_reload_and_opens_with_settings(tab: Tab) -> None:
    page = tab.go()
    tab.draw("a red apple", seed=5, count=2)
    tab.draw("a smiling cat", seed=6, count=1)
    thumbs = page.locator("#history .thumb")
    wait_until(lambda: tab.kept() == 2)
    tab.go()
    expect(thumbs).to_have_count(2)
    thumbs.nth(1).click()
    expect(page.locator(".tile")).to_have_count(2)
    values = page.evaluate("['prompt', 'seed', 'count'].map((id) => document.getElementById(id).value)")
    assert values == ["a red apple", "5", "2"]
    assert read_record(tab.downloaded()[1]) is not None
    page.click("#forget")
    wait_until(lambda: tab.kept() == 0)
    tab.go()
    expect(page.locator("#history")).to_be_hidden()


def test_both_colour_schemes_can_be_read(tab: Tab) -> None:
    page = tab.go()
    seen = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        seen.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert tab.poor_contrasts() == []
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == seen[0] != seen[1]
    tab.go()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == seen[0]
