"""The report of a run: one HTML file with everything in it, for a person to read.

``write_report(data, path)`` takes the plain numbers and pictures of :class:`oar_scale.report.report_data.ReportData`. The
file loads nothing from anywhere (its content security policy forbids it), so it can be mailed, archived and opened offline.
"""

from __future__ import annotations

import math
from typing import get_args

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from oar_scale.evaluation.pictures import heat_map, known_part
from oar_scale.observe.console import duration
from oar_scale.registry import MODELS, model_label
from oar_scale.report import figures, summary
from oar_scale.report.report_data import ReportData
from oar_scale.results.estimates import NllTable, OrderName
from oar_scale.storage import open_storage

__all__ = ["page_environment", "render_report", "write_report"]


def write_report(report: ReportData, path: str) -> None:
    """Write the report to ``path`` (a local file or an object URI), whole or not at all."""
    open_storage(path).write(path, render_report(report).encode())


def page_environment() -> Environment:
    """Templates of self-contained pages: ``page.html.j2`` is their frame, ``parts.html.j2`` what they share."""
    environment = Environment(
        loader=PackageLoader("oar_scale", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        png=figures.data_uri,
        appearing=figures.appearing_uri,
        number=summary.number,
        signed=summary.signed,
        estimate=summary.plus_minus,
        duration=_stage_duration,
        model_label=model_label,
    )
    environment.globals.update(heat_map=heat_map, known_part=known_part, colour_ramp=Markup(figures.colour_ramp()))
    return environment


def render_report(report: ReportData) -> str:
    """The report as HTML text."""
    environment = page_environment()
    environment.globals.update(verdict=summary.verdict, measured=summary.measured, standard_errors=summary.STANDARD_ERRORS)
    grid = len(report.orders.mean_step_of_cell) if report.orders else 0
    return environment.get_template("report.html.j2").render(
        report=report,
        sentences=summary.summarise(report),
        key_numbers=summary.key_numbers(report),
        curves=[(curve.title, Markup(figures.curve_svg(curve))) for curve in report.curves],
        nll=_nll_rows(report.nll) if report.nll else None,
        orders_of_table=_orders_in(report.nll) if report.nll else [],
        leak=math.lgamma(grid * grid + 1) / (grid * grid) if grid else 0.0,
        uniform_nll=math.log(report.tokenizer.codebook_size) if report.tokenizer else None,
        random_neighbour_share=_random_neighbour_share(grid) if grid else None,
        raster_neighbour_share=grid * (grid - 1) / (grid * grid - 1) if grid else None,
    )


def _nll_rows(table: NllTable) -> list[tuple[str, list[tuple[str, bool]]]]:
    """For each model the cells of its row: the text, and whether it is the lowest of its column."""
    entries = {(entry.model, entry.order): entry.nll for entry in table.entries}
    orders = _orders_in(table)
    best = {order: min(nll.mean for (_, o), nll in entries.items() if o == order) for order in orders}
    rows = []
    for model in MODELS:
        row = [entries.get((model, order)) for order in orders]
        cells = [(summary.plus_minus(nll), nll.mean == best[order]) if nll else ("", False) for order, nll in zip(orders, row, strict=True)]
        if any(text for text, _ in cells):
            rows.append((model_label(model), cells))
    return rows


def _orders_in(table: NllTable) -> list[OrderName]:
    orders: tuple[OrderName, ...] = get_args(OrderName)
    return [order for order in orders if any(entry.order == order for entry in table.entries)]


def _random_neighbour_share(grid: int) -> float:
    """Share of steps to one of the four neighbours that random orders would have: edges of the grid over pairs of cells."""
    cells = grid * grid
    return 2 * grid * (grid - 1) / (cells * (cells - 1) / 2)


def _stage_duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)
