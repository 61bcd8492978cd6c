"""Fetch three free emoji sets from the npm registry and draw them: 10,856 pictures with captions, in three styles.

    python tools/fetch_emoji.py data/emoji          then: oar run recipes/emoji.yaml

    OUT/images/SET/NAME.png     OUT/emoji.csv (image, caption, name, family, style)     OUT/ATTRIBUTION.txt     OUT/sheet.png

The sets are packages of vector drawings (Iconify's JSON). npm fetches them from the registry it is configured for; where there is
no npm, the registry that NPM_CONFIG_REGISTRY names is queried directly. ``name`` is the same in all styles and ``family`` the same for
all skin tones, so that a held-out picture is held out in every style.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from oar_scale.data.sources import BadImage
from oar_scale.data.sources.openmoji import draw
from oar_scale.errors import UserError
from oar_scale.runtime.program import program
from oar_scale.storage.local import atomic_file

PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "fluent-emoji-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "twemoji": "@iconify-json/twemoji@1.2.5",
}
STYLES = {"noto": "noto", "fluent-emoji-flat": "flat", "twemoji": "twemoji"}
FILES = ("icons.json", "chars.json", "info.json")
TONES = {"1f3fb": "light", "1f3fc": "medium-light", "1f3fd": "medium", "1f3fe": "medium-dark", "1f3ff": "dark"}
TONE_WORDS = re.compile(r"[ ,:]*\b(medium )?(light|medium|dark)( skin tone)?\b")
SHEET = 48


@dataclass(frozen=True)
class Picture:
    """One drawing of one set."""

    set_name: str
    icon: str
    name: str
    """The name, with the skin tone: ``waving hand, dark skin tone``."""
    family: str
    """Without it."""
    svg: str

    @property
    def path(self) -> str:
        return f"images/{self.set_name}/{self.icon}.png"

    @property
    def style(self) -> str:
        return STYLES.get(self.set_name, self.set_name)

    @property
    def caption(self) -> str:
        return f"{self.name}, {self.style} style"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("out", help="folder to make")
    arguments.add_argument("--size", type=int, default=64, help="side of a picture in pixels (64)")
    arguments.add_argument("--sets", help="folder with an unpacked package for each set, instead of the registry")
    options = arguments.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="emoji-") as scratch:
        sets = Path(options.sets or scratch)
        if options.sets is None:
            for name, package in PACKAGES.items():
                fetch(package, sets / name)
        print(f"fetched in {time.monotonic() - started:.1f} s", flush=True)
        write_set(sets, Path(options.out), options.size)
    print(f"{options.out}: {time.monotonic() - started:.1f} s in all")


def write_set(sets: Path, out: Path, size: int) -> None:
    """Draw all sets of a folder into ``out``, and say how many there are and whose they are. ``emoji.csv`` is there when all else is.

    Raises:
        UserError: no such size, no set, one that lacks a file, or none with a drawing.
    """
    if size < 1:
        raise UserError(f"--size {size}: a picture has no such side. Give pixels, such as 64.")
    folders = sorted(file.parent for file in sets.glob("*/icons.json"))
    if not folders:
        raise UserError(f"{sets}: no unpacked package is here, a folder with icons.json. Name another folder, or leave out --sets.")
    missing = [str(folder / name) for folder in folders for name in FILES if not (folder / name).exists()]
    if missing:
        raise UserError(f"{', '.join(missing)}: not there, so the package is incomplete. Unpack it again, or leave out --sets.")
    pictures = read_pictures(folders)
    (out / "emoji.csv").unlink(missing_ok=True)  # `make evidence` fetches the set where there is no table
    for folder in folders:
        (out / "images" / folder.name).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        faults = list(pool.map(_draw, pictures, [out] * len(pictures), [size] * len(pictures), chunksize=64))
    drawn = [picture for picture, fault in zip(pictures, faults, strict=True) if not fault]
    if not drawn:
        raise UserError(
            f"{sets}: none of {len(pictures)} drawings shows anything, or can be drawn. Name another folder, or leave out --sets."
        )
    credits = [attribution(folder) for folder in folders]
    (out / "ATTRIBUTION.txt").write_text("\n".join(credits) + "\n")
    contact_sheet(drawn, out, size).save(out / "sheet.png")
    table = io.StringIO(newline="")
    rows = csv.writer(table)
    rows.writerow(["image", "caption", "name", "family", "style"])
    rows.writerows([picture.path, picture.caption, picture.name, picture.family, picture.style] for picture in drawn)
    with atomic_file(str(out / "emoji.csv")) as file:
        file.write(table.getvalue().encode())

    counts, toned = Counter(p.set_name for p in drawn), Counter(p.set_name for p in drawn if p.name != p.family)
    for folder, credit in zip(folders, credits, strict=True):
        print(f"{folder.name}: {counts[folder.name]} pictures, {toned[folder.name]} of them with a skin tone\n  {credit}")
    for picture, fault in zip(pictures, faults, strict=True):
        if fault:
            print(f"  left out {picture.path}: {fault}")
    print(f"{len(drawn)} pictures, {len({p.name for p in drawn})} names, {len({p.caption for p in drawn})} captions")


def fetch(package: str, folder: Path) -> None:
    """Get ``@scope/name@version`` and put the files of the set into ``folder``. Raises UserError."""
    with tempfile.TemporaryDirectory(prefix="emoji-") as scratch:
        archive = _npm_pack(package, scratch) if shutil.which("npm") else _download(package, scratch)
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as tar:
            for name in FILES:
                content = tar.extractfile(f"package/{name}")
                assert content is not None, f"{package} has no {name}"
                (folder / name).write_bytes(content.read())


def _npm_pack(package: str, scratch: str) -> str:
    done = subprocess.run(["npm", "pack", "--silent", package], cwd=scratch, capture_output=True, text=True)
    if done.returncode:
        output = done.stderr.strip() or done.stdout.strip()
        raise UserError(f"npm pack {package} failed:\n{output}\nCheck the network and the registry: npm config get registry")
    return os.path.join(scratch, done.stdout.split()[-1])


def _download(package: str, scratch: str) -> str:
    """The package from the registry itself, compared with the checksum that the registry states."""
    registry = os.environ.get("NPM_CONFIG_REGISTRY", "").rstrip("/")
    if not registry:
        raise UserError("npm is not installed: install it, or name a registry in NPM_CONFIG_REGISTRY")
    name, _, version = package.rpartition("@")
    try:
        with urllib.request.urlopen(f"{registry}/{name}/{version}", timeout=60) as answer:
            dist: dict[str, Any] = json.load(answer)["dist"]
        with urllib.request.urlopen(dist["tarball"], timeout=60) as answer:
            data = answer.read()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{package}: cannot be fetched from {registry} ({error}). Check NPM_CONFIG_REGISTRY and the network.") from error
    digest = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
    if digest not in dist["integrity"].split():
        raise UserError(f"{package}: what {registry} sent does not have the checksum it states. Try again.")
    path = os.path.join(scratch, "package.tgz")
    Path(path).write_bytes(data)
    return path


def read_pictures(folders: Iterable[Path]) -> list[Picture]:
    """All drawings of all sets. A drawing that has a code point is current; the others are names of older versions."""
    sets = {folder.name: [json.loads((folder / name).read_text()) for name in FILES[:2]] for folder in folders}
    names: dict[str, str] = {}
    for _, chars in sets.values():
        for sequence, icon in chars.items():
            names.setdefault(_plain(sequence), icon.replace("-", " "))
    pictures = []
    for set_name, (icons, chars) in sets.items():
        for sequence, icon in sorted(chars.items()):
            if not icons["icons"][icon].get("hidden"):
                name, family = name_of(sequence, icon, names)
                pictures.append(Picture(set_name, icon, name, family, svg_of(icons, icon)))
    return pictures


def name_of(sequence: str, icon: str, names: dict[str, str]) -> tuple[str, str]:
    """Name and family of the code points ``1f44b-1f3ff``, given the names of the code points without skin tones."""
    plain = _plain(sequence)
    tones = [TONES[point] for point in plain.split("-") if point in TONES]
    bare = "-".join(point for point in plain.split("-") if point not in TONES)
    if not tones or not bare:
        return names[plain], names[plain]
    family = names.get(bare) or TONE_WORDS.sub("", icon.replace("-", " ")).strip()
    return f"{family}, {' and '.join(dict.fromkeys(tones))} skin tone", family


def _plain(sequence: str) -> str:
    """The sequence without the variation selector that requests a coloured picture, which some sets write and others leave out."""
    return "-".join(point for point in sequence.lower().split("-") if point != "fe0f")


def svg_of(icons: dict[str, Any], icon: str) -> str:
    """A drawing as a square SVG."""
    drawing = icons["icons"][icon]
    width, height = (drawing.get(side, icons.get(side, 16)) for side in ("width", "height"))
    side = max(width, height)
    left, top = drawing.get("left", 0) - (side - width) / 2, drawing.get("top", 0) - (side - height) / 2
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left:g} {top:g} {side:g} {side:g}" width="{side:g}" height="{side:g}">{drawing["body"]}</svg>'
    )


def attribution(folder: Path) -> str:
    """Who made a set, and what its licence asks for."""
    info = json.loads((folder / "info.json").read_text())
    author, licence = info["author"], info["license"]
    return f"{info['name']} by {author['name']} ({author.get('url', '')}), {licence['title']} ({licence.get('url', '')})"


def _draw(picture: Picture, out: Path, size: int) -> str:
    """Draw one picture; returns what is wrong with it, nothing if it is written."""
    try:
        image = draw(picture.svg, size)
    except BadImage as fault:
        return str(fault)
    if np.asarray(image).min() == 255:
        return "it is blank"
    image.save(out / picture.path)
    return ""


def contact_sheet(pictures: list[Picture], out: Path, size: int) -> Image.Image:
    """Some pictures from everywhere in the list, side by side."""
    chosen = [pictures[index] for index in np.linspace(0, len(pictures) - 1, min(SHEET, len(pictures))).astype(int)]
    columns = 12
    sheet = Image.new("RGB", (columns * (size + 8), -(-len(chosen) // columns) * (size + 8)), "lightgrey")
    for index, picture in enumerate(chosen):
        with Image.open(out / picture.path) as image:
            sheet.paste(image, (index % columns * (size + 8) + 4, index // columns * (size + 8) + 4))
    return sheet


if __name__ == "__main__":
    program(main)
