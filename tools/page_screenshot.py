"""Takes docs/images/serve.png: the page of `oar serve` with the quick start's model. Needs the extras serve and dev, and Chromium.

python tools/page_screenshot.py [--out docs/images/serve.png] [--dark] [--size 1280x800]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

from oar_scale.runtime.program import program

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "serve.png")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--size", default="1280x800", help="width and height of the window")
    request = parser.parse_args()
    command = [sys.executable, "-m", "oar_scale.cli", "serve", str(ROOT / "recipes" / "weights" / "emoji"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            address = server.stdout.readline().split(" on ")[1].split()[0]
            take(address, request.out, request.dark, *map(int, request.size.split("x")))
        finally:
            server.terminate()
            server.communicate()


def take(address: str, out: Path, dark: bool, width: int, height: int) -> None:
    """Draw four pictures, and go back to the middle of the drawing."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
        page.goto(address)
        for prompt, count in (("a red heart", 1), ("a red apple", 1), ("a grinning face", 4)):
            page.fill("#prompt", prompt)
            page.fill("#count", str(count))
            page.fill("#seed", "3")
            page.click("#draw")
            expect(page.locator("#draw")).to_be_visible(timeout=120_000)
            expect(page.locator("#download")).to_be_enabled()
        page.locator("#step").fill("40")
        page.locator("#prompt").blur()
        page.wait_for_timeout(500)
        page.screenshot(path=out)
        browser.close()


if __name__ == "__main__":
    program(main)
