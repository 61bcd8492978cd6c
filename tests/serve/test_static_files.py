"""The files of both pages are in what is installed, and ask for nothing but each other."""

from __future__ import annotations

import ast
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVE, STUDY = (ROOT / "oar_scale" / package / "static" for package in ("serve", "preference"))


@pytest.fixture(params=[SERVE, STUDY], ids=["serve", "study"])
def static(request: pytest.FixtureRequest) -> Path:
    """The files of a page's own."""
    folder: Path = request.param
    return folder


def test_the_wheel_takes_every_file_of_the_page(static: Path) -> None:
    (call,) = [
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "setup"
    ]
    package_data = next(ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg == "package_data")
    patterns = package_data[f"oar_scale.{static.parent.name}"]
    files = [str(path.relative_to(static.parent)) for path in static.rglob("*") if path.is_file()]
    assert "static/index.html" in files
    assert [name for name in files if not any(fnmatch(name, pattern) for pattern in patterns)] == []


def test_no_file_of_the_page_has_inline_code_or_foreign_addresses(static: Path) -> None:
    html = (static / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:", html)
    for path in static.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|url\(|@import|innerHTML|insertAdjacentHTML|document\.write|\beval\(", text), path.name


def test_every_name_that_the_scripts_look_up_is_in_the_page(static: Path) -> None:
    html = (static / "index.html").read_text(encoding="utf-8")
    ids = re.findall(r'\bid="([\w-]+)"', html)
    assert len(ids) == len(set(ids))
    for path in static.glob("*.js"):
        named = re.findall(r'byId\("([\w-]+)"\)', path.read_text(encoding="utf-8"))
        assert set(named) <= set(ids), path.name
    referred = [name for names in re.findall(r'(?:for|aria-describedby|aria-labelledby|list)="([\w -]+)"', html) for name in names.split()]
    assert set(referred) <= set(ids)


def test_every_file_that_the_pages_load_is_there(static: Path) -> None:
    """The study's page has files of `oar serve`, too, and its own below `static/study`."""
    named = re.findall(r'(?:href|src)="static/([\w./-]+)"', (static / "index.html").read_text(encoding="utf-8"))
    assert len(named) >= 4
    assert not [name for name in named if not (STUDY / name[6:] if name.startswith("study/") else SERVE / name).is_file()]
    for path in static.glob("*.js"):
        for name in re.findall(r'^import .* from "([^"]+)";$', path.read_text(encoding="utf-8"), re.MULTILINE):
            assert (SERVE / Path(name).name).is_file(), name
