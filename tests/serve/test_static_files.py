"""The files of the page are in what is installed, and ask for nothing but each other."""

from __future__ import annotations

import ast
import re
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STATIC = ROOT / "oar_scale" / "serve" / "static"


def test_the_wheel_takes_every_file_of_the_page() -> None:
    (call,) = [
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "setup"
    ]
    patterns = next(ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg == "package_data")["oar_scale.serve"]
    files = [str(path.relative_to(STATIC.parent)) for path in STATIC.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [name for name in files if not any(fnmatch(name, pattern) for pattern in patterns)] == []


def test_no_file_of_the_page_has_inline_code_or_foreign_addresses() -> None:
    html = (STATIC / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:", html)
    for path in STATIC.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|url\(|@import|innerHTML|insertAdjacentHTML|document\.write|\beval\(", text), path.name


def test_every_name_that_the_scripts_look_up_is_in_the_page() -> None:
    html = (STATIC / "index.html").read_text(encoding="utf-8")
    ids = re.findall(r'\bid="([\w-]+)"', html)
    assert len(ids) == len(set(ids))
    for path in STATIC.glob("*.js"):
        named = re.findall(r'byId\("([\w-]+)"\)', path.read_text(encoding="utf-8"))
        assert set(named) <= set(ids), path.name
    referred = [name for names in re.findall(r'(?:for|aria-describedby|aria-labelledby|list)="([\w -]+)"', html) for name in names.split()]
    assert set(referred) <= set(ids)
