"""The pictures of the report, each as text that goes straight into the page.

Photographs and maps become PNG data URIs, one pixel an image pixel or a cell (the page scales them up unsmoothed). Curves
become inline SVG that takes its colours from the page, so that they read on light and on dark.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from oar_scale.evaluation.animation import animated, appearing
from oar_scale.evaluation.pictures import COLOUR_MAP, png
from oar_scale.report.report_data import TrainingCurve
from oar_scale.results.examples import DrawingExample, Picture

DIFFERENCE_MAP = "RdBu"
"""Red below zero, blue above."""

# Stand-ins that matplotlib writes into the SVG and the page's own colours that replace them.
_INK, _RULE, _LOSS, _HELDOUT = "#010203", "#040506", "#070809", "#0a0b0c"
_PAGE_COLOURS = {_INK: "var(--muted)", _RULE: "var(--rule)", _LOSS: "var(--soft)", _HELDOUT: "var(--accent)"}


def data_uri(picture: Picture) -> str:
    """PNG of a uint8 [H, W, 3] picture as a ``data:`` URI.

    Raises:
        ValueError: not uint8 [H, W, 3].
    """
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"a picture is uint8 [H, W, 3], got {picture.dtype} {list(picture.shape)}")
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode()


def appearing_uri(drawing: DrawingExample) -> str:
    """A sample that appears cell by cell, as the ``data:`` URI of a WebP animation."""
    frames = appearing([drawing.picture], drawing.order_N[None], columns=1, pixels=128)
    return "data:image/webp;base64," + base64.b64encode(animated(frames, "WEBP")).decode()


def colour_ramp(colours: str = COLOUR_MAP) -> str:
    """The colours of :func:`heat_map` as a CSS gradient, low to high."""
    stops = [to_hex(colormaps[colours](share)) for share in np.linspace(0, 1, 9)]
    return f"linear-gradient(to right, {', '.join(stops)})"


def curve_svg(curve: TrainingCurve) -> str:
    """Training loss and held-out NLL over the steps of one stage, as inline SVG."""
    lines = [Line(curve.loss_name, curve.loss.steps, curve.loss.values)]
    if curve.heldout is not None:
        lines.append(Line("held-out NLL, random orders", curve.heldout.steps, curve.heldout.values))
    return line_chart(curve.title, "step", "nats per code" if curve.heldout else curve.loss_name, lines, marked=curve.heldout is not None)


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def line_chart(title: str, x_label: str, y_label: str, lines: Sequence[Line], *, marked: bool = False) -> str:
    """One or two lines as inline SVG, the second one in the page's accent colour; named where there are two.

    Args:
        title: names the figure's inner ids; no two figures of a page have the same.
        marked: the points of the second line are few, and shown.
    """
    figure = Figure(figsize=(5.4, 2.9), layout="constrained")
    axes = figure.add_subplot()
    styles: list[dict[str, Any]] = [{"color": _LOSS, "linewidth": 1.2}, {"color": _HELDOUT, "linewidth": 1.8}]
    if marked:
        styles[1] |= {"marker": "o", "markersize": 4}
    for line, style in zip(lines, styles, strict=False):
        axes.plot(line.x, line.y, label=line.name, **style)
    axes.set_xlabel(x_label, color=_INK)
    axes.set_ylabel(y_label, color=_INK)
    axes.tick_params(colors=_INK, length=0)
    axes.grid(color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    if len(lines) > 1:
        axes.legend(frameon=False, labelcolor=_INK, loc="best")
    return _inline_svg(figure, title)


def _inline_svg(figure: Figure, title: str) -> str:
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    buffer = io.StringIO()
    # Text stays text; the salt makes the ids of the SVG the same in each run and different in each figure.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for stand_in, colour in _PAGE_COLOURS.items():
        svg = svg.replace(stand_in, colour)
    return svg
