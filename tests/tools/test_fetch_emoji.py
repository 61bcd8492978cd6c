"""The emoji sets, on two made-up ones of a few drawings each: names across styles, skin tones, pictures, and the table of them."""

from __future__ import annotations

import base64
import csv
import hashlib
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter

from oar_scale.config.schema import DataConfig, Source
from oar_scale.data.prepare import prepare_images
from oar_scale.errors import UserError
from tools import fetch_emoji
from tools.fetch_emoji import fetch, write_set

HAND = '<path fill="{}" d="M4 4h8v8H4z"/>'
INFO = {"author": {"name": "Somebody", "url": "there"}, "license": {"title": "CC0", "url": "here"}}


def put_set(folder: Path, icons: dict[str, dict[str, Any]], chars: dict[str, str]) -> None:
    folder.mkdir(parents=True)
    (folder / "icons.json").write_text(json.dumps({"prefix": folder.name, "width": 16, "height": 16, "icons": icons}))
    (folder / "chars.json").write_text(json.dumps(chars))
    (folder / "info.json").write_text(json.dumps({"name": f"{folder.name} set", **INFO}))


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    put_set(
        tmp_path / "sets/noto",
        {
            "waving-hand": {"body": HAND.format("gold")},
            "waving-hand-dark-skin-tone": {"body": HAND.format("brown")},
            "police-car-light": {"body": HAND.format("red")},
            "old-name": {"body": HAND.format("blue"), "hidden": True},
            "handshake-light-skin-tone-dark-skin-tone": {"body": HAND.format("tan")},
            "nothing": {"body": ""},
            "broken": {"body": "<path"},
        },
        {
            "1f44b": "waving-hand",
            "1f44b-1f3ff": "waving-hand-dark-skin-tone",
            "1f6a8": "police-car-light",
            "1faf1-1f3fb-200d-1faf2-1f3ff": "handshake-light-skin-tone-dark-skin-tone",
            "1f001": "nothing",
            "1f002": "broken",
        },
    )
    put_set(
        tmp_path / "sets/fluent-emoji-flat",
        {"hand-waving": {"body": HAND.format("gold"), "width": 8, "left": 4}, "hand-waving-dark": {"body": HAND.format("brown")}},
        {"1f44b-fe0f": "hand-waving", "1f44b-1f3ff": "hand-waving-dark"},
    )
    return tmp_path / "sets"


def test_names_are_the_same_in_every_style(sets: Path, tmp_path: Path, capsys: Any) -> None:
    """Families have the same name in every skin tone."""
    write_set(sets, tmp_path / "out", 16)
    with open(tmp_path / "out/emoji.csv", newline="") as file:
        rows = sorted(tuple(row.values()) for row in csv.DictReader(file))
    dark, both = "hand waving, dark skin tone", "handshake, light and dark skin tone"
    assert rows == [
        ("images/fluent-emoji-flat/hand-waving-dark.png", f"{dark}, flat style", dark, "hand waving", "flat"),
        ("images/fluent-emoji-flat/hand-waving.png", "hand waving, flat style", "hand waving", "hand waving", "flat"),
        ("images/noto/handshake-light-skin-tone-dark-skin-tone.png", f"{both}, noto style", both, "handshake", "noto"),
        ("images/noto/police-car-light.png", "police car light, noto style", "police car light", "police car light", "noto"),
        ("images/noto/waving-hand-dark-skin-tone.png", f"{dark}, noto style", dark, "hand waving", "noto"),
        ("images/noto/waving-hand.png", "hand waving, noto style", "hand waving", "hand waving", "noto"),
    ]
    output = capsys.readouterr().out
    assert "noto: 4 pictures, 2 of them with a skin tone\n  noto set by Somebody (there), CC0 (here)" in output
    assert "left out images/noto/nothing.png: it is blank" in output
    assert "left out images/noto/broken.png: cannot be drawn" in output
    assert "6 pictures, 4 names, 6 captions" in output
    assert (tmp_path / "out/ATTRIBUTION.txt").read_text().count("CC0 (here)") == 2


def test_drawings_are_square_on_white_and_not_stretched(sets: Path, tmp_path: Path) -> None:
    write_set(sets, tmp_path / "out", 16)
    for name in ("noto/waving-hand", "fluent-emoji-flat/hand-waving"):  # the second one is 8 wide and 16 high
        pixels = np.asarray(Image.open(tmp_path / f"out/images/{name}.png"))
        assert pixels.shape == (16, 16, 3)
        assert (pixels[5:11, 5:11] == (255, 215, 0)).all() and (pixels[:3] == 255).all() and (pixels[:, :3] == 255).all()
    assert Image.open(tmp_path / "out/sheet.png").width == 12 * 24


def test_the_table_is_a_source(sets: Path, tmp_path: Path) -> None:
    write_set(sets, tmp_path / "out", 16)
    fields = {"type": "table", "path": str(tmp_path / "out/emoji.csv"), "name": "name", "family": "family"}
    source: Source = TypeAdapter(Source).validate_python(fields)
    manifests = prepare_images(DataConfig(source=source, image_size=16, heldout_fraction=0.6), str(tmp_path / "shards"))
    assert sum(manifest.samples for manifest in manifests.values()) == 6


@pytest.mark.parametrize("failing", ["attribution", "contact_sheet"])
def test_the_table_is_there_only_when_all_else_is(failing: str, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``make evidence`` fetches the set where there is no table: one of a call that was cut off would stand for a whole set."""

    def cut_off(*_: Any) -> None:
        raise OSError("No space left on device")

    write_set(sets, tmp_path / "out", 16)
    monkeypatch.setattr(fetch_emoji, failing, cut_off)
    with pytest.raises(OSError, match="No space left"):
        write_set(sets, tmp_path / "out", 8)
    assert not (tmp_path / "out/emoji.csv").exists()


def test_an_incomplete_package_and_one_without_pictures_are_named(sets: Path, tmp_path: Path) -> None:
    put_set(tmp_path / "blank/noto", {"nothing": {"body": ""}}, {"1f001": "nothing"})
    with pytest.raises(UserError, match="blank: none of 1 drawings"):
        write_set(tmp_path / "blank", tmp_path / "out", 16)
    (sets / "noto/chars.json").unlink()
    with pytest.raises(UserError, match=r"noto/chars\.json: not there"):
        write_set(sets, tmp_path / "out", 16)
    assert not (tmp_path / "out/emoji.csv").exists()


# -- a registry on the loopback address, as npm's answers --------------------------------------------------------------------


@pytest.fixture
def registry(sets: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """The set noto as a package, where npm is not installed."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(sets / "noto", "package")
    archive = buffer.getvalue()
    dist: dict[str, Any] = {"integrity": "sha512-" + base64.b64encode(hashlib.sha512(archive).digest()).decode()}

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = {"/@icons/noto/1.0.0": json.dumps({"dist": dist}).encode(), "/noto.tgz": archive}
            self.send_response(200 if self.path in known else 404)
            self.end_headers()
            self.wfile.write(known.get(self.path, b""))

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    dist["tarball"] = f"http://127.0.0.1:{server.server_port}/noto.tgz"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("PATH", str(tmp_path))
    yield dist
    server.shutdown()
    server.server_close()


def test_without_npm_the_registry_is_asked_directly(registry: dict[str, Any], sets: Path, tmp_path: Path) -> None:
    fetch("@icons/noto@1.0.0", tmp_path / "fetched")
    for name in ("icons.json", "chars.json", "info.json"):
        assert (tmp_path / "fetched" / name).read_bytes() == (sets / "noto" / name).read_bytes()
    with pytest.raises(UserError, match=r"@icons/none@1\.0\.0: cannot be fetched from http://127"):
        fetch("@icons/none@1.0.0", tmp_path / "none")
    registry["integrity"] = "sha512-AAAA"
    with pytest.raises(UserError, match="does not have the checksum"):
        fetch("@icons/noto@1.0.0", tmp_path / "damaged")


def test_a_folder_without_packages_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "none"):
        with pytest.raises(UserError, match=f"{folder}: no unpacked package is here"):
            write_set(tmp_path / folder, tmp_path / "out", 16)
    assert not (tmp_path / "out").exists()


def test_without_npm_and_registry_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("NPM_CONFIG_REGISTRY", raising=False)
    with pytest.raises(UserError, match="npm is not installed: install it, or name a registry in NPM_CONFIG_REGISTRY"):
        fetch("@icons/noto@1.0.0", tmp_path / "fetched")
